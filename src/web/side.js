// One model's half of the stage: its settings, its device time and its images.

import { measure } from "./cards.js";
import { duration } from "./result.js";

const SAMPLERS = ["ddpm", "ddim", "dpm++", "euler", "heun", "pndm", "euler-ancestral"];
/** The only one for networks trained by flow matching. */
const FLOW = "flow-euler";

/** Images smaller than this are shown as the pixels they are. */
const SMALL = 128;

export class Side {
  constructor(section) {
    this.section = section;
    this.title = section.querySelector("h2");
    this.clock = section.querySelector(".clock");
    this.board = section.querySelector(".board");
    const foot = section.querySelector(".foot");
    foot.append(document.getElementById("foot").content.cloneNode(true));
    this.model = foot.querySelector(".model select");
    this.steps = foot.querySelector(".steps");
    this.sampler = foot.querySelector(".sampler");
    this.note = foot.querySelector(".note");
    this.save = foot.querySelector(".download");
    this.save.addEventListener("click", () => this.download());
    this.blank(1);
  }

  /** Offers the models, `chosen` selected; a model that was selected before keeps its settings. */
  offer(models, chosen) {
    const before = this.model.value;
    this.cards = new Map(models.map((model) => [model.id, model]));
    this.model.replaceChildren(...models.map(({ id }) => new Option(id, id, false, id === chosen)));
    if (before !== chosen) this.choose();
  }

  /** Takes over the defaults of the model that is selected. */
  choose() {
    const card = this.card;
    this.title.textContent = card.role.charAt(0).toUpperCase() + card.role.slice(1);
    this.save.ariaLabel = `Download ${card.id}’s images`;
    this.steps.disabled = this.sampler.disabled = false;
    this.steps.max = card.num_train_timesteps;
    this.steps.value = card.defaults.num_inference_steps;
    const preset = card.defaults.scheduler;
    const samplers = preset === FLOW ? [FLOW] : new Set([...SAMPLERS, preset]);
    this.sampler.replaceChildren(
      ...[...samplers].map((name) => new Option(name, name, false, name === preset)),
    );
    this.describe();
    this.blank(1);
  }

  get card() {
    return this.cards.get(this.model.value);
  }

  /** Whether its images are small enough to be shown as pixels. */
  get small() {
    return parseInt(this.card.size) < SMALL;
  }

  describe() {
    this.note.textContent = `${this.card.id}: ${measure(this.card)}`;
  }

  /** Empties the board for `count` images. */
  blank(count) {
    this.board.style.setProperty("--across", Math.ceil(Math.sqrt(count)));
    this.board.replaceChildren(...Array.from({ length: count }, () => document.createElement("div")));
    this.section.classList.remove("done");
    this.clock.textContent = "";
    this.save.disabled = true;
  }

  begin(count) {
    this.blank(count);
    this.left = count;
    this.device = 0;
    /** How far each image is, in quarters: three previews, and the image. */
    this.quarters = Array(count).fill(0);
    this.tell();
    this.describe();
  }

  /** Shows an image; says whether it was the last one. */
  show(event, isFinal) {
    const cell = this.board.children[event.index];
    const image = cell.firstChild ?? cell.appendChild(new Image());
    image.classList.toggle("small", parseInt(event.size) < SMALL);
    image.src = `data:image/${event.output_format};base64,${event.b64_json}`;
    const drawn = event.class_name ?? (event.class_label === undefined ? "Image" : `Class ${event.class_label}`);
    image.alt = `${drawn}, seed ${event.seed}, by ${event.model}${isFinal ? "" : ", not finished"}`;
    image.dataset.seed = event.seed;
    this.quarters[event.index] = isFinal ? 4 : event.partial_image_index + 1;
    if (isFinal) {
      this.left -= 1;
      this.device += event.timings.device_ms;
    }
    this.tell();
    if (this.left) return false;
    this.section.classList.add("done");
    this.save.disabled = false;
    return true;
  }

  /** While it draws, how far it is; then its device time. */
  tell() {
    const done = this.quarters.reduce((sum, quarters) => sum + quarters, 0) / (4 * this.quarters.length);
    this.clock.textContent = this.left ? `${Math.round(100 * done)} %` : duration(this.device);
  }

  /** No time is told of what did not finish. */
  halt() {
    if (this.left) this.clock.textContent = "";
  }

  /** Where the time went, once all is over. */
  account({ network_evaluations, device_ms, mean_batch }) {
    this.device = device_ms;
    this.tell();
    this.note.textContent =
      `${this.card.id}: ${network_evaluations} evaluations, batch ${mean_batch.toFixed(1)}`;
  }

  /** Saves the image as the server sent it; several as one picture, beside one another. */
  async download() {
    const images = [...this.board.querySelectorAll("img")];
    const [first, last] = [images[0], images.at(-1)].map(({ dataset }) => dataset.seed);
    const link = document.createElement("a");
    link.download = `${this.card.id}-seed-${images.length > 1 ? `${first}-to-${last}` : first}.png`;
    link.href = images.length > 1 ? await sheet(images) : images[0].src;
    link.click();
    if (images.length > 1) URL.revokeObjectURL(link.href);
  }
}

/** Images beside one another, pixel for pixel, as the address of a PNG. */
async function sheet(images) {
  const across = Math.ceil(Math.sqrt(images.length));
  const { naturalWidth: width, naturalHeight: height } = images[0];
  const canvas = document.createElement("canvas");
  canvas.width = across * width;
  canvas.height = Math.ceil(images.length / across) * height;
  const context = canvas.getContext("2d");
  images.forEach((image, at) => context.drawImage(image, (at % across) * width, Math.floor(at / across) * height));
  return URL.createObjectURL(await new Promise((made) => canvas.toBlob(made)));
}
