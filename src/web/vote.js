// The blind vote: two images of one seed, without names until one is chosen, and how the votes stand.

import { ask } from "./api.js";

const byId = (id) => document.getElementById(id);
const picks = [...document.querySelectorAll(".pick")];
const SIDES = ["Left", "Right"];

/** What keys choose while the focus is in the ballot. */
const KEYS = { 1: 0, ArrowLeft: 0, 2: 1, ArrowRight: 1, 0: "tie", ArrowDown: "tie" };

/** Longest id of an experiment. */
const ID_LENGTH = 64;

/** Below it a preference is called one. */
const LEVEL = 0.05;

let complain;
/** The two models of an experiment that can be started with one click. */
let couple;
/** Sizes of models' images: small ones are shown as the pixels they are. */
let widths = new Map();
/** Prompts that show what a model makes, of those that read any. */
let examples = new Map();
let experiments = [];
/** The pair on the ballot: its id, the vote's key, and whether it waits for a choice. */
let pair;
/** What the button below the images does. */
let goOn;

/** Which models there are, and the two that a new experiment would be between. */
export function offer(models, two) {
  widths = new Map(models.map(({ id, size }) => [id, parseInt(size)]));
  examples = new Map(models.map(({ id, example_prompts }) => [id, example_prompts ?? []]));
  couple = two;
}

/** Shows what there is to vote on; `tell` shows a problem. */
export async function enter(tell) {
  complain = tell;
  await attempt(async () => {
    await list();
    if (experiments.length && !pair) await draw();
  });
}

async function list(chosen = byId("poll").value) {
  experiments = (await (await ask("/v1/experiments")).json()).data;
  byId("poll").replaceChildren(...experiments.map(({ id }) => new Option(id, id, false, id === chosen)));
  byId("poll-field").hidden = experiments.length < 2;
  const known = couple && experiments.some(({ arms }) => couple.every((id) => arms.some(({ model }) => model === id)));
  byId("create").hidden = !couple || known;
  byId("create").textContent = experiments.length ? "Start another" : "Start voting";
  byId("create-note").hidden = !couple && experiments.length > 0;
  byId("create-note").textContent = known ? "" : couple ? `Between ${couple.join(" and ")}.` : "It takes two models: start the server with the folders of both, understudy serve --models DIR_OF_TEACHER --models DIR_OF_STUDENT.";
  standing();
}

async function begin() {
  await list();
  byId("ballot").hidden = !experiments.length;
  if (experiments.length) await draw();
}

async function create() {
  const taken = new Set(experiments.map(({ id }) => id));
  const name = couple.join("-vs-").slice(0, ID_LENGTH - 3);
  let id = name;
  for (let number = 2; taken.has(id); number += 1) id = `${name}-${number}`;
  await ask("/v1/experiments", { id, arms: couple.map((model) => ({ model, weight: 1 })) });
  pair = undefined;
  await list(id);
  await draw();
}

/** Puts the next pair on the ballot. */
async function draw() {
  const id = byId("poll").value;
  pair = { experiment: id };
  byId("ballot").hidden = false;
  byId("question").textContent = "Drawing …";
  byId("go-on").hidden = true;
  for (const [side, pick] of picks.entries()) {
    pick.classList.remove("chosen");
    pick.querySelector(".frame").replaceChildren();
    caption(side, SIDES[side]);
  }
  enable(false);
  const { arms } = experiments.find((one) => one.id === id);
  const prompts = arms.flatMap(({ model }) => examples.get(model) ?? []);
  const prompt = prompts[Math.floor(Math.random() * prompts.length)];
  const drawn = await ask(`/v1/experiments/${id}/pairs`, prompt ? { prompt } : {}).then((reply) => reply.json()).catch((problem) => {
    byId("question").textContent = "";
    offerToGoOn("Try again", begin);
    throw problem;
  });
  if (byId("poll").value !== id) return;
  const key = [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  pair = { experiment: id, id: drawn.pair_id, key, waits: true };
  const small = arms.every(({ model }) => widths.get(model) < 128);
  drawn.images.forEach(({ b64_json }, side) => {
    const image = new Image();
    image.src = `data:image/png;base64,${b64_json}`;
    image.alt = "";
    image.classList.toggle("small", small);
    picks[side].querySelector(".frame").replaceChildren(image);
  });
  const what = prompt ?? drawn.class_name ?? (drawn.class_label === undefined ? "picture" : `picture of class ${drawn.class_label}`);
  byId("question").textContent = `Which is the better ${prompt ?? drawn.class_name ? `“${what}”` : what}?`;
  enable(true);
  byId("ballot").focus({ preventScroll: true });
}

async function choose(choice) {
  if (!pair?.waits) return;
  pair.waits = false;
  enable(false);
  const body = { pair_id: pair.id, choice, idempotency_key: pair.key };
  const send = () => ask(`/v1/experiments/${pair.experiment}/votes`, body);
  const reply = await send().then((reply) => reply.json()).catch((problem) => {
    // The same vote under the same key: it counts once, whether or not it had arrived.
    offerToGoOn(problem.status && problem.status < 500 ? "Next pair" : "Send again", () => {
      if (problem.status && problem.status < 500) return begin();
      pair.waits = true;
      return choose(choice);
    });
    throw problem;
  });
  for (const [side, model] of reply.models.entries()) {
    picks[side].classList.toggle("chosen", side === choice);
    caption(side, model);
  }
  byId("question").textContent = choice === "tie" ? "You saw no difference." : `You preferred ${reply.winner}.`;
  byId("status").textContent = `${byId("question").textContent} Left was ${reply.models[0]}, right was ${reply.models[1]}.`;
  offerToGoOn("Next pair", draw);
  await list();
}

function offerToGoOn(label, action) {
  goOn = action;
  byId("go-on").textContent = label;
  byId("go-on").hidden = false;
  byId("go-on").focus({ preventScroll: true });
}

function enable(open) {
  for (const button of [...picks, byId("tie")]) button.disabled = !open;
}

function caption(side, text) {
  const key = document.createElement("kbd");
  key.textContent = side + 1;
  picks[side].querySelector(".caption").replaceChildren(text, ...(SIDES.includes(text) ? [" ", key] : []));
}

/** How the votes of the chosen experiment stand. */
function standing() {
  const experiment = experiments.find(({ id }) => id === byId("poll").value);
  byId("arms").textContent = experiment ? [`Experiment ${experiment.id}: ${experiment.arms.map(called).join(" against ")}.`, ...rollout(experiment)].join(" ") : "";
  const votes = experiment?.comparisons.reduce((sum, { wins, losses, ties }) => sum + wins + losses + ties, 0);
  byId("standing").hidden = !votes;
  if (!votes) return;
  byId("standings").replaceChildren(...experiment.arms.map(row));
  byId("finding").textContent = finding(experiment.arms, votes);
}

/** As votes name an arm: its model, with its steps where it says them. */
function called({ model, num_inference_steps: steps }) {
  return steps ? `${model}@${steps}` : model;
}

/** What guardrails and a ramp did of themselves. */
function rollout({ arms, ramp }) {
  const said = arms.filter(({ stopped }) => stopped).map((arm) => `${called(arm)} was stopped: ${arm.stopped.reason.replaceAll("`", "")}.`);
  if (ramp?.phase === "running") said.push(`${called(arms[1])} has ${percent(arms[1].share)} of the traffic, stage ${ramp.stage} of ${ramp.shares.length}.`);
  return said;
}

const percent = (share) => `${Number((100 * share).toPrecision(3))} %`;

function finding(arms, votes) {
  const counted = `${votes} ${votes === 1 ? "vote" : "votes"}`;
  const best = arms.reduce((best, arm) => ((arm.win_rate ?? -1) > (best.win_rate ?? -1) ? arm : best));
  const p = best.p_value < 0.001 ? "p < 0.001" : `p = ${best.p_value.toFixed(3)}`;
  // With more arms there are more chances to be wrong: Bonferroni's correction.
  const proven = best.p_value * (arms.length > 2 ? arms.length : 1) <= LEVEL;
  if (proven && best.win_rate > 0.5) return `${called(best)} is preferred, after ${counted} (${p}).`;
  return `No preference is proven after ${counted} (${p}).`;
}

function row(arm) {
  const { wins, ties, win_rate, wilson_interval } = arm;
  const row = document.createElement("tr");
  const head = document.createElement("th");
  head.scope = "row";
  head.textContent = head.title = called(arm);
  row.append(head);
  for (const cell of [wins, ties]) row.insertCell().textContent = cell;
  const rate = row.insertCell();
  if (win_rate === null) rate.textContent = "–";
  else {
    const [low, high] = wilson_interval.map((end) => Math.round(100 * end));
    const bar = document.createElement("i");
    const range = document.createElement("small");
    range.textContent = `${low} to ${high} %`;
    bar.style.setProperty("--low", low);
    bar.style.setProperty("--high", high);
    bar.style.setProperty("--at", 100 * win_rate);
    rate.append(`${Math.round(100 * win_rate)} % `, bar, range);
  }
  return row;
}

/** Does something that the server may refuse. */
async function attempt(action) {
  byId("problem").textContent = "";
  try {
    await action();
  } catch (problem) {
    complain(problem);
  }
}

picks.forEach((pick, side) => pick.addEventListener("click", () => attempt(() => choose(side))));
byId("tie").addEventListener("click", () => attempt(() => choose("tie")));
byId("go-on").addEventListener("click", () => attempt(() => goOn()));
byId("ballot").addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || !(event.key in KEYS) || !pair?.waits) return;
  event.preventDefault();
  attempt(() => choose(KEYS[event.key]));
});
byId("poll").addEventListener("change", () => {
  standing();
  attempt(draw);
});
byId("poll-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!byId("create").hidden) attempt(create);
});
