// The page: reads the form, runs a comparison, shows what comes.

import { Problem, ask, stream, useKey, whole } from "./api.js";
import { watch } from "./live.js";
import * as result from "./result.js";
import { Side } from "./side.js";
import * as vote from "./vote.js";

const byId = (id) => document.getElementById(id);
const teacher = new Side(document.querySelector(".teacher"));
const student = new Side(document.querySelector(".student"));

/** The most previews of an image that a request may ask for. */
const PREVIEWS = 3;

/** Seeds that "New seed" draws from: short enough to be told to somebody. */
const SEEDS = 100_000;

/** Ends the run that is under way. */
let running;

/** Title and first paragraph of the two views. */
const words = {
  compare: [byId("title").textContent, byId("lede").textContent],
  vote: ["Which is better?", "Two models drew from the same seed. You learn which is which once you have chosen."],
};

const alone = () => document.body.classList.contains("solo");
const sides = () => (alone() ? [teacher] : [teacher, student]);

function complain(problem) {
  const message = problem instanceof Problem ? problem.message : `This page failed: ${problem}.`;
  byId("problem").replaceChildren(...marked(message));
  if (problem.status === 401) {
    byId("access").open = true;
    byId("key").focus();
  }
  if (!(problem instanceof Problem)) console.error(problem);
}

/** A message's text, with `names` of fields and flags set as code. */
function marked(message) {
  return message.split("`").map((text, at) => {
    if (at % 2 === 0) return text;
    const code = document.createElement("code");
    code.textContent = text;
    return code;
  });
}

async function load() {
  try {
    const { data } = await (await ask("/v1/models")).json();
    const ready = data.filter((model) => model.ready);
    if (!ready.length) {
      const reasons = data.map(({ id, reason }) => `${id}: ${reason}`).join("; ");
      throw new Problem(`No model is ready. ${reasons || "The server has no models"}.`);
    }
    byId("problem").textContent = "";
    offer(ready);
    byId("fields").disabled = false;
    performance.mark("interactive");
  } catch (problem) {
    complain(problem);
  }
}

function offer(models) {
  const [first, ...others] = models;
  const second =
    others.find(({ role, teacher }) => role === "student" && teacher === first.id) ??
    others.find(({ role }) => role === "student") ??
    others[0];
  document.body.classList.toggle("solo", !second);
  byId("run").textContent = second ? "Compare" : "Draw";
  teacher.offer(models, first.id);
  if (second) {
    student.offer(models, second.id);
  } else {
    words.compare = ["Nothing to compare yet.", `Only ${first.id} is served, and it draws alone. Put a student beside it in the folder of --models to see both.`];
  }
  vote.offer(models, second && [first.id, second.id]);
  view();
  exclude();
  classes();
}

/** Shows the view that the address names. */
function view() {
  const name = location.hash === "#vote" ? "vote" : "compare";
  for (const part of document.querySelectorAll("[data-view]")) part.hidden = part.dataset.view !== name;
  for (const link of document.querySelectorAll(".top nav a")) {
    if (link.hash === `#${name}`) link.ariaCurrent = "page";
    else link.ariaCurrent = null;
  }
  [byId("title").textContent, byId("lede").textContent] = words[name];
  byId("problem").textContent = "";
  if (name === "vote") vote.enter(complain);
}

/** The two sides are two models: each leaves out the other's. */
function exclude() {
  for (const [side, other] of [[teacher, student], [student, teacher]]) {
    for (const option of side.model.options) option.disabled = option.value === other.model.value;
    side.model.parentElement.hidden = side.model.options.length < 3;
  }
}

function classes() {
  const { class_names = [], num_classes = 0 } = teacher.card;
  const chosen = byId("class").value;
  const options = Array.from({ length: num_classes }, (_, number) => new Option(class_names[number] ?? number, number));
  byId("class").replaceChildren(new Option("Any", ""), ...options);
  if (chosen && chosen < num_classes) byId("class").value = chosen;
  byId("class-field").hidden = !num_classes;
}

function request() {
  const count = Number(byId("count").value);
  const label = byId("class").value;
  const each = (value) => (alone() ? value(teacher) : [value(teacher), value(student)]);
  return {
    [alone() ? "model" : "models"]: each((side) => side.model.value),
    seed: Number(byId("seed").value),
    n: count,
    num_inference_steps: each((side) => Number(side.steps.value)),
    scheduler: each((side) => side.sampler.value),
    partial_images: PREVIEWS,
    ...(label !== "" && { class_label: Number(label) }),
  };
}

async function run() {
  const body = request();
  const abort = (running = new AbortController());
  byId("problem").textContent = "";
  byId("run").textContent = "Stop";
  byId("status").textContent = "Drawing.";
  result.clear();
  for (const side of sides()) side.begin(body.n);
  let ticking = true;
  const tick = () => {
    if (!ticking) return;
    for (const side of sides()) if (side.elapsed === undefined) side.tick();
    requestAnimationFrame(tick);
  };
  tick();
  try {
    await (alone() ? draw(body, abort.signal) : compare(body, abort.signal));
  } catch (problem) {
    if (abort.signal.aborted) byId("status").textContent = "Stopped.";
    else complain(problem);
  } finally {
    ticking = false;
    for (const side of sides()) side.halt();
    running = undefined;
    byId("run").textContent = alone() ? "Draw" : "Compare";
  }
}

async function compare(body, signal) {
  const events = stream("/v1/compare", body, signal);
  for await (const event of whole(events, ({ type }) => type === "compare.completed")) {
    if (event.type === "compare.completed") {
      event.timings.forEach((timings, side) => sides()[side].account(timings));
      byId("status").textContent = result.show(event, sides().map((side) => side.title.textContent));
      return;
    }
    const side = sides()[event.side];
    finish(side, event, event.draft || event.type === "image_generation.completed");
  }
}

async function draw(body, signal) {
  const timings = [];
  const isFinal = ({ type }) => type === "image_generation.completed";
  const events = stream("/v1/images/generations", body, signal);
  for await (const event of whole(events, () => timings.length === body.n)) {
    finish(teacher, event, isFinal(event));
    if (isFinal(event)) timings.push(event.timings);
    if (timings.length === body.n) result.alone(timings);
  }
}

function finish(side, event, isFinal) {
  const isLast = side.show(event, isFinal);
  if (isLast) byId("status").textContent = `${side.title.textContent} finished after ${side.clock.textContent}.`;
}

/** Grey noise for boards that are still empty: an ornament, not what the models start from. */
function noise() {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 32;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(32, 32);
  for (let at = 0; at < pixels.data.length; at += 4) pixels.data.set([128, 128, 128, Math.random() * 110], at);
  context.putImageData(pixels, 0, 0);
  document.body.style.setProperty("--noise", `url(${canvas.toDataURL()})`);
}

byId("controls").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else run();
});
byId("reseed").addEventListener("click", () => {
  byId("seed").value = Math.floor(Math.random() * SEEDS);
  if (!running) byId("controls").requestSubmit();
});
addEventListener("hashchange", view);
byId("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  byId("access").open = false;
  useKey(byId("key").value);
  load();
});
for (const side of [teacher, student]) {
  side.model.addEventListener("change", () => {
    side.choose();
    exclude();
    classes();
  });
}
for (const view of document.getElementsByName("view")) {
  view.addEventListener("change", () => byId("stage").classList.toggle("over", view.value === "over"));
}
byId("cut").addEventListener("input", ({ target }) => byId("stage").style.setProperty("--cut", `${target.value}%`));

noise();
result.clear();
load().then(() => watch(() => sides().map((side) => side.model.value).filter(Boolean)));
