// Model cards: what a model is, what was measured of it, and what such a score means.

/** Scores by name: how people call them, which way is better, and what they mean. */
const SCORES = [
  [/^FID-to-teacher$/, "FID to the teacher", "lower", "Fréchet distance to images of the teacher in Inception’s features."],
  [/^FD-(.+)-to-teacher$/, "Distance to the teacher", "lower", "Fréchet distance to images of the teacher in the features of the classifier $1; 0 is the teacher itself. It is not FID."],
  [/^FID$/, "FID", "lower", "Fréchet distance to the reference in Inception’s features. Published figures are of 50,000 images."],
  [/^FD-(.+)$/, "Fréchet distance", "lower", "Distance to the reference in the features of the classifier $1; 0 is the reference itself. It is not FID."],
  [/^class_agreement$/, "Class agreement", "higher", "Share of the images that a classifier takes for the class that was asked for; 1 is all."],
  [/^inception_score$/, "Inception score", "higher", "High where each image is clearly of one class and all classes occur; at most the number of classes."],
  [/^kernel_distance$/, "Kernel distance", "lower", "Another distance to the reference in the same features, unbiased for few images; 0 is none."],
  [/^precision$/, "Precision", "higher", "Share of its images that look like the reference’s: fidelity, 0 to 1."],
  [/^recall$/, "Recall", "higher", "Share of the reference that its images cover: variety, 0 to 1."],
  [/^prompt_adherence(_held_out)?$/, "Prompt adherence", "higher", "Share of its images whose nearest picture in the reference has the caption that was asked for, 0 to 1."],
  [/^speed_up$/, "Speed-up", "higher", "How many times as fast as its teacher, on the machine that measured it."],
  [/^.*psnr.*$/i, "PSNR", "higher", "Likeness to the teacher’s images of the same seeds, in decibels. At 20 dB pixels differ by 10 % of the range, at 26 dB by 5 %, at 40 dB by 1 % (root mean square)."],
  [/^.*ssim.*$/i, "SSIM", "higher", "Likeness of structure to the teacher’s images of the same seeds; 1 is identical."],
];

/** What a card says of how its scores were measured; told in a sentence instead of a row each. */
const SETTINGS = ["samples", "num_inference_steps", "scheduler", "guidance_scale", "seed", "reference"];
const SPREAD = /_(deviation|between_seeds)$/;

const number = (value, digits = 4) => new Intl.NumberFormat("en", { maximumSignificantDigits: digits }).format(value);
const count = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

/** Weights, size and element type of a model, in a few words. */
export function measure({ parameters, size, dtype }) {
  return `${count.format(parameters)} parameters, ${size.replace("x", "×")}, ${dtype}`;
}

/** Shows the cards of the models that are compared. */
export function show(models) {
  document.getElementById("cards").replaceChildren(...models.map(card));
}

function card(model, side) {
  const article = element("article", "", side ? "student" : "teacher");
  const { num_inference_steps, scheduler } = model.defaults;
  article.append(
    element("h3", model.id),
    element("p", `${name(model)}. ${measure(model)}. By default ${num_inference_steps} steps of ${scheduler}.`, "note"),
    ...scores(model),
  );
  return article;
}

const name = ({ role, teacher }) => role.charAt(0).toUpperCase() + role.slice(1) + (teacher ? ` of ${teacher}` : "");

function scores({ id, teacher, max_prompt_tokens, scores = {} }) {
  // What a student's teacher scored beside it stands in the same card, as `…_teacher`.
  const rows = Object.entries(scores).filter(([key]) => !SETTINGS.includes(key) && !SPREAD.test(key) && !key.endsWith("_teacher"));
  if (!rows.length) {
    // What measures models draws by class, not after text.
    if (max_prompt_tokens) return [element("p", "Its card has no scores.", "note")];
    const none = element("p", "Its card has no scores yet. Measure them with ", "note");
    const against = teacher ? `--against ${teacher}` : "--reference IMAGES";
    none.append(element("code", `understudy evaluate --model ${id} ${against}`), ".");
    return [none];
  }
  const list = document.createElement("dl");
  list.append(...rows.map(([key, value]) => row(key, value, scores[`${key}_deviation`] ?? scores[`${key}_between_seeds`])));
  return [element("p", measured(scores), "note"), list];
}

function row(key, value, deviation) {
  const [pattern, label, better, meaning] = SCORES.find(([pattern]) => pattern.test(key)) ?? [undefined, key];
  const row = document.createElement("div");
  const told = typeof value === "number" ? number(value) : typeof value === "string" ? value : JSON.stringify(value);
  const term = element("dt", label);
  if (better) term.append(" ", element("small", `${better} is better`));
  row.append(term, element("dd", deviation === undefined ? told : `${told} ± ${number(deviation, 2)}`));
  if (meaning) row.append(element("dd", key.replace(pattern, meaning), "meaning"));
  return row;
}

function measured({ samples, num_inference_steps, scheduler, reference }) {
  const parts = [
    samples && `${number(samples, 21)} images`,
    num_inference_steps && `${num_inference_steps} steps${scheduler ? ` of ${scheduler}` : ""}`,
    reference && `against ${reference}`,
  ].filter(Boolean);
  return parts.length ? `Scores of ${parts.join(", ")}.` : "Scores:";
}

function element(tag, text, className = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = className;
  return element;
}
