// One model's half of the stage: its settings, its clock and its images.

import { duration } from "./result.js";

const SAMPLERS = ["ddpm", "ddim", "dpm++", "euler", "heun"];

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
    this.blank(1);
  }

  /** Offers the models, `chosen` first selected. */
  offer(models, chosen) {
    this.cards = new Map(models.map((model) => [model.id, model]));
    this.model.replaceChildren(...models.map(({ id }) => new Option(id, id, false, id === chosen)));
    this.choose();
  }

  /** Takes over the defaults of the model that is selected. */
  choose() {
    const card = this.card;
    this.title.textContent = card.role.charAt(0).toUpperCase() + card.role.slice(1);
    this.clock.ariaLabel = `${this.title.textContent}’s clock`;
    this.steps.disabled = this.sampler.disabled = false;
    this.steps.max = card.num_train_timesteps;
    this.steps.value = card.defaults.num_inference_steps;
    const samplers = new Set([...SAMPLERS, card.defaults.scheduler]);
    this.sampler.replaceChildren(
      ...[...samplers].map((name) => new Option(name, name, false, name === card.defaults.scheduler)),
    );
    this.describe();
  }

  get card() {
    return this.cards.get(this.model.value);
  }

  describe() {
    const { parameters, size, dtype } = this.card;
    const count = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
    this.note.textContent = `${count.format(parameters)} parameters, ${size.replace("x", "×")}, ${dtype}`;
  }

  /** Empties the board for `count` images. */
  blank(count) {
    this.board.style.setProperty("--across", Math.ceil(Math.sqrt(count)));
    this.board.replaceChildren(...Array.from({ length: count }, () => document.createElement("div")));
  }

  begin(count) {
    this.blank(count);
    this.section.classList.remove("done");
    this.left = count;
    this.began = performance.now();
    this.elapsed = undefined;
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
    if (!isFinal) return false;
    this.left -= 1;
    if (this.left) return false;
    this.elapsed = performance.now() - this.began;
    this.tick();
    this.section.classList.add("done");
    return true;
  }

  tick() {
    const elapsed = this.elapsed ?? performance.now() - this.began;
    this.clock.textContent = `${(elapsed / 1000).toFixed(elapsed < 1e5 ? 2 : 1)} s`;
  }

  /** Stops a clock that has nothing to stop for any more: no time is told of what did not finish. */
  halt() {
    if (this.elapsed === undefined) this.clock.textContent = "";
  }

  /** Where the time went, once all is over. */
  account({ network_evaluations, device_ms, mean_batch }) {
    this.note.textContent =
      `${network_evaluations} evaluations, ${duration(device_ms)} on the device, batch ${mean_batch.toFixed(1)}`;
  }
}
