// Which models there are, how far those are that are being loaded, and which two are compared.

import { ask } from "./api.js";

const EVERY_MS = 250;

/** Models, until none of them is being loaded any more. */
export async function* follow(signal) {
  for (;;) {
    const { data } = await (await ask("/v1/models", undefined, signal)).json();
    yield data;
    if (!data.some(({ loading }) => loading)) return;
    await new Promise((wake) => setTimeout(wake, EVERY_MS));
    if (signal.aborted) return;
  }
}

/** Of ready models, the default one first: a teacher and its student, else any two, else the only one. */
export function pairOf(ready) {
  const [first] = ready;
  const students = ready.filter((student) => teacherOf(student, ready));
  const student = students.find(({ teacher }) => teacher === first.id) ?? students.find(({ id }) => id === first.id) ?? students[0];
  return student ? [teacherOf(student, ready), student] : ready.slice(0, 2);
}

const teacherOf = ({ id, teacher }, models) => models.find((model) => model.id === teacher && model.id !== id);

/** Whether two models are a teacher and its student. */
export const related = ([teacher, student]) => Boolean(student) && student.teacher === teacher.id;

/** What keeps a teacher and its student from being compared, and how to mend it; undefined where nothing does. */
export function missing(models, pair) {
  if (related(pair)) return undefined;
  const command = "understudy serve --models DIR_OF_TEACHER --models DIR_OF_STUDENT";
  const remedy = "Stop this server, and start it with the folders that hold both:";
  const orphan = pair.find(({ teacher }) => teacher);
  if (orphan) {
    const listed = models.find(({ id }) => id === orphan.teacher);
    if (listed) return { text: `${orphan.id} is the student of ${orphan.teacher}, which is not ready: ${listed.reason}.` };
    return { text: `${orphan.id} is the student of ${orphan.teacher}, which this server does not have. ${remedy}`, command };
  }
  if (pair.length > 1) return undefined;
  return { text: `${pair[0].id} has no student on this server, so there is nothing to compare it with. If you have one: ${remedy.charAt(0).toLowerCase()}${remedy.slice(1)}`, command };
}

/** A line for each model that is on its way: what is being done and how far it is. */
export function showLoads(place, models) {
  const known = new Map([...place.children].map((row) => [row.dataset.model, row]));
  place.replaceChildren(...models.map((model) => line(known.get(model.id) ?? blank(model.id), model)));
}

function blank(id) {
  const row = document.createElement("li");
  row.dataset.model = id;
  const name = document.createElement("b");
  name.textContent = id;
  const bar = document.createElement("progress");
  bar.ariaLabel = `${id}, share of the work done`;
  row.append(name, document.createElement("span"), bar);
  return row;
}

function line(row, { ready, reason, loading }) {
  const [, words, bar] = row.children;
  words.textContent = ready ? "Ready" : loading ? stage(loading) : `Not ready: ${reason}`;
  row.dataset.stage = ready ? "ready" : loading?.stage ?? "failed";
  const done = ready ? 1 : loading ? share(loading) : 0;
  if (done === undefined) bar.removeAttribute("value");
  else bar.value = done;
  return row;
}

function stage({ stage, seconds, budget_seconds }) {
  const spent = `${seconds.toFixed(1)} s`;
  if (stage === "waiting") return "Waiting for the model before it";
  if (stage === "downloading") return `Downloading from the Hub, ${spent}`;
  if (stage === "reading") return `Reading its files, ${spent}`;
  return `Measuring its speed, ${spent} of at most ${budget_seconds} s`;
}

/** The share of the time that is known to be the most; undefined where nobody knows. */
function share({ stage, seconds, budget_seconds }) {
  if (stage === "waiting") return 0;
  return budget_seconds && Math.min(1, seconds / budget_seconds);
}
