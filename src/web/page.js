// The page: reads the form, runs comparisons, shows what comes.

import * as address from "./address.js";
import { Problem, ask, keyed, stream, useKey, whole } from "./api.js";
import * as cards from "./cards.js";
import * as condition from "./condition.js";
import { follow, missing, pairOf, related, showLoads } from "./models.js";
import { copy, curl, path, python } from "./reproduce.js";
import * as result from "./result.js";
import * as session from "./session.js";
import { Side } from "./side.js";
import * as vote from "./vote.js";

const byId = (id) => document.getElementById(id);
const teacher = new Side(document.querySelector(".teacher"));
const student = new Side(document.querySelector(".student"));

/** The most previews of an image that a request may ask for. */
const PREVIEWS = 3;

/** Seeds that "New seed" draws from: short enough to be told to somebody. */
const SEEDS = 100_000;

/** Images of each side in the first comparison, where they are small: enough for a first impression. */
const FIRST_COUNT = 4;

/** Runs that "more runs" adds. */
const REPETITIONS = 5;

/** A server that could not be reached, or has no model, is asked again after so long. */
const RETRY_MS = 1000;

/** Ends the run that is under way. */
let running;
/** Ends the wait for models. */
let following;
/** The ready models that are offered, as text to compare; empty before there are any. */
let offered = "";
/** The models that are ready. */
let models = [];
/** Whether the models that are compared were run since the page was opened. */
let used = false;

const alone = () => document.body.classList.contains("solo");
const sides = () => (alone() ? [teacher] : [teacher, student]);

function complain(problem) {
  const message = problem instanceof Problem ? problem.message : `This page failed: ${problem}.`;
  if (byId("problem").textContent !== message.replaceAll("`", "")) byId("problem").replaceChildren(...marked(message));
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

/** Whether the problem that is shown is that there was no server or no model; both may come. */
let unanswered = false;

/** Follows the models until all are loaded, and goes on as soon as there is something to compare. */
async function load() {
  following?.abort();
  const { signal } = (following = new AbortController());
  try {
    for await (const models of follow(signal)) {
      const ready = models.filter((model) => model.ready);
      const loading = models.filter((model) => model.loading);
      if (!ready.length && !loading.length) throw new Problem(`No model is ready. ${models.map(({ id, reason }) => `${id}: ${reason}`).join("; ") || "The server has no models"}.`);
      if (unanswered) byId("problem").textContent = "";
      unanswered = false;
      // A pair need not wait for models that nobody asks for.
      const asked = address.read().models;
      const awaited = loading.some(({ id }) => asked.includes(id)) || !ready.length || !related(pairOf(ready));
      if (loading.length && awaited) wait(models);
      else offer(models, ready);
    }
  } catch (problem) {
    if (signal.aborted) return;
    if (!offered) byId("lede").textContent = "";
    complain(problem);
    unanswered = problem.status === 0;
    if (unanswered) setTimeout(() => signal.aborted || load(), RETRY_MS);
  }
}

/** Says how far the models are. */
function wait(models) {
  if (offered) return;
  const ready = models.filter((model) => model.ready).length;
  document.body.classList.add("warming");
  byId("title").textContent = "Getting the models ready";
  byId("lede").textContent = `${ready} of ${models.length} ready. The page goes on by itself.`;
  showLoads(byId("loads"), models);
}

function offer(all, ready) {
  const ids = JSON.stringify(ready.map(({ id, created }) => [id, created]));
  if (ids === offered) return;
  const first = !offered;
  offered = ids;
  models = ready;
  const there = (id) => ready.find((model) => model.id === id);
  const before = sides().map(({ model }) => there(model.value));
  const asked = first ? address.read() : undefined;
  const linked = asked?.models.map(there) ?? [];
  const pair =
    linked.length >= Math.min(2, ready.length) && linked.every(Boolean) ? linked.slice(0, 2)
    : before.length === 2 && before.every(Boolean) ? before
    : pairOf(ready);
  const same = pair.length === before.length && pair.every((model, side) => model === before[side]);
  used &&= same;
  if (!same) stop();
  document.body.classList.remove("warming");
  document.body.classList.toggle("solo", pair.length < 2);
  byId("loads").replaceChildren();
  teacher.offer(ready, pair[0].id);
  if (pair[1]) student.offer(ready, pair[1].id);
  compared();
  tellMissing(missing(all, pair));
  if (!running) label();
  if (first) restore(asked, linked);
  view();
  byId("fields").disabled = false;
  performance.mark("interactive");
  if (!used && !voting() && !running) run();
}

/** The server was gone and is back, perhaps with other models. */
function returned() {
  offered = "";
  load();
}

/** Fills the form from a link, and says what of it cannot be had here. */
function restore({ models, steps, samplers, label, prompt, seed, count, view }, linked) {
  const refused = models.filter((_, at) => !linked[at]).map((id) => `the model ${id}`);
  const set = (input, value, name) => {
    if (value === undefined) return;
    const before = input.value;
    input.value = value;
    if (input.value === value && input.checkValidity()) return;
    input.value = before;
    refused.push(`${name} = ${value}`);
  };
  if (teacher.small) byId("count").value = FIRST_COUNT;
  set(byId("seed"), seed, "seed");
  set(byId("count"), count, "n");
  if (label !== undefined && !condition.choose(label)) refused.push(`class = ${label}`);
  if (prompt !== undefined && !condition.write(prompt)) refused.push(`prompt = ${prompt}`);
  sides().forEach((side, at) => {
    set(side.steps, steps[at], "steps");
    set(side.sampler, samplers[at], "sampler");
  });
  if (view === "over") document.querySelector("[name=view][value=over]").click();
  if (refused.length) complain(new Problem(`This link asks for what this server does not have: ${refused.join(", ")}. The defaults are used instead.`));
}

function tellMissing(missing) {
  byId("notice").replaceChildren();
  if (!missing) return;
  const text = document.createElement("p");
  text.textContent = missing.text;
  byId("notice").append(text);
  if (!missing.command) return;
  const command = document.createElement("code");
  command.textContent = missing.command;
  byId("notice").append(command);
}

/** What depends on which models are compared. */
function compared() {
  for (const [side, other] of [[teacher, student], [student, teacher]]) {
    // The two sides are two models: each leaves out the other's.
    for (const option of side.model.options) option.disabled = !alone() && option.value === other.model.value;
    side.model.parentElement.hidden = side.model.options.length < 3;
  }
  condition.offer(sides().map(({ card }) => card));
  cards.show(sides().map(({ card }) => card));
  byId("history-first").textContent = teacher.title.textContent;
  byId("history-second").textContent = student.title.textContent;
  result.choose(sides().map(({ model }) => model.value));
  vote.offer(models, alone() ? undefined : sides().map(({ model }) => model.value));
}

const voting = () => location.hash === "#vote";

/** Shows the view that the address names. */
function view() {
  const name = voting() ? "vote" : "compare";
  for (const part of document.querySelectorAll("[data-view]")) part.hidden = part.dataset.view !== name;
  for (const link of document.querySelectorAll(".top nav a")) {
    link.ariaCurrent = link.hash === `#${name}` ? "page" : null;
  }
  if (!offered) return;
  headline();
  if (name === "vote") vote.enter(complain);
}

/** Title and first paragraph. */
function headline() {
  if (voting()) {
    byId("title").textContent = "Which is better?";
    byId("lede").textContent = "Two models drew from the same seed. You learn which is which once you have chosen.";
    return;
  }
  const [first, second] = sides().map(({ card }) => card);
  const name = (card, side) => {
    const name = document.createElement("span");
    name.className = `who ${side}`;
    name.textContent = card.id;
    return name;
  };
  const between = document.createElement("small");
  between.textContent = second && related([first, second]) ? " and its student " : " and ";
  byId("title").replaceChildren(name(first, "teacher"), ...(second ? [between, name(second, "student")] : []));
  byId("lede").textContent = second
    ? "Both draw the same images from the same noise, on one device. What does the student gain, and what does it cost?"
    : "It draws alone: there is no second model to compare it with.";
}

function label() {
  byId("run").textContent = running ? "Stop" : alone() ? "Draw" : "Compare";
}

function request() {
  const each = (value) => (alone() ? value(teacher) : [value(teacher), value(student)]);
  return {
    [alone() ? "model" : "models"]: each((side) => side.model.value),
    ...condition.request(),
    seed: Number(byId("seed").value),
    n: Number(byId("count").value),
    num_inference_steps: each((side) => Number(side.steps.value)),
    scheduler: each((side) => side.sampler.value),
  };
}

const link = () => address.of(request(), document.querySelector("[name=view]:checked").value);

/** Ends the run that is under way: nothing more of it is shown. */
function stop() {
  running?.abort();
  running = undefined;
}

/** One comparison; whether it came to its end. */
async function run() {
  const body = request();
  const abort = (running = new AbortController());
  used = true;
  let finished = false;
  label();
  byId("status").textContent = "Drawing.";
  result.clear();
  for (const side of sides()) side.begin(body.n);
  try {
    await (alone() ? draw : compare)(body, abort.signal);
    finished = true;
  } catch (problem) {
    if (!abort.signal.aborted) complain(problem);
    else if (!running) byId("status").textContent = "Stopped.";
  } finally {
    // One that was stopped may have a successor by now.
    if (running === abort) running = undefined;
    if (!running) for (const side of sides()) side.halt();
    label();
  }
  return finished;
}

async function compare(body, signal) {
  const events = stream(path(body), { ...body, partial_images: PREVIEWS }, signal);
  for await (const event of whole(events, ({ type }) => type === "compare.completed")) {
    if (event.type === "compare.completed") {
      event.timings.forEach((timings, side) => sides()[side].account(timings));
      session.add(body, event.timings.map(({ device_ms }) => device_ms), event.speedup.device);
      byId("status").textContent = result.show(event);
      return;
    }
    const side = sides()[event.side];
    finish(side, event, event.draft || event.type === "image_generation.completed");
  }
}

async function draw(body, signal) {
  const timings = [];
  const isFinal = ({ type }) => type === "image_generation.completed";
  const events = stream(path(body), { ...body, partial_images: PREVIEWS }, signal);
  for await (const event of whole(events, () => timings.length === body.n)) {
    finish(teacher, event, isFinal(event));
    if (isFinal(event)) timings.push(event.timings);
    if (timings.length === body.n) result.alone(timings);
  }
}

function finish(side, event, isFinal) {
  const isLast = side.show(event, isFinal);
  if (isLast) byId("status").textContent = `${side.title.textContent} finished: ${side.clock.textContent} of device time.`;
}

/** Runs the same comparison several times more, or until one does not come to its end. */
async function repeat() {
  for (let number = 1; number <= REPETITIONS; number += 1) {
    byId("repeat").textContent = `Run ${number} of ${REPETITIONS}`;
    if (!(await run())) break;
  }
  byId("repeat").textContent = `${REPETITIONS} more runs`;
}

/** Does what a person asked for, unless a run is under way. */
function start(action) {
  if (running || !byId("controls").reportValidity()) return;
  byId("problem").textContent = "";
  address.write(link());
  action();
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
  if (running) stop();
  else start(run);
});
byId("reseed").addEventListener("click", () => {
  byId("seed").value = Math.floor(Math.random() * SEEDS);
  start(run);
});
byId("repeat").addEventListener("click", () => start(repeat));
addEventListener("hashchange", () => {
  byId("problem").textContent = "";
  view();
  if (offered && !voting() && !used && !running) run();
});
byId("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  byId("access").open = false;
  useKey(byId("key").value);
  byId("problem").textContent = "";
  load();
});
for (const side of [teacher, student]) {
  side.model.addEventListener("change", () => {
    stop();
    side.choose();
    for (const each of sides()) each.blank(1);
    compared();
    headline();
  });
}
document.addEventListener("change", ({ target }) => {
  if (offered && !voting() && (target.form === byId("controls") || target.closest(".stage, .views")) && byId("controls").checkValidity()) address.write(link());
});
for (const view of document.getElementsByName("view")) {
  view.addEventListener("change", () => byId("stage").classList.toggle("over", view.value === "over"));
}
byId("cut").addEventListener("input", ({ target }) => byId("stage").style.setProperty("--cut", `${target.value}%`));
byId("copy-link").addEventListener("click", () => copy(link(), "Link"));
byId("copy-curl").addEventListener("click", () => copy(curl(request(), keyed()), "Command"));
byId("copy-python").addEventListener("click", () => copy(python(request(), keyed()), "Program"));

noise();
view();
load();
// Nothing waits for it.
const { watch } = await import("./live.js");
watch(() => (offered ? sides().map((side) => side.model.value) : []), returned);
