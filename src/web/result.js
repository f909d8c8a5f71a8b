// What comparisons found: the speed-up over the session's runs, and how alike the images are.

import { dots } from "./chart.js";
import * as session from "./session.js";

const byId = (id) => document.getElementById(id);

/** Milliseconds for people. */
export function duration(milliseconds) {
  if (milliseconds < 1) return `${milliseconds.toFixed(2)} ms`;
  if (milliseconds < 1000) return `${milliseconds.toPrecision(3)} ms`;
  return `${(milliseconds / 1000).toPrecision(3)} s`;
}

const times = (ratio) => (ratio === null ? "–" : ratio.toFixed(ratio < 10 ? 2 : 1));

/** The models whose speed-up is shown. */
let models = [];

/** Shows what the session has of two models. */
export function choose(ids) {
  models = ids;
  clear();
  speed();
}

/** Forgets what the images of the run before came to. The session's runs stay. */
export function clear() {
  byId("facts").replaceChildren();
}

/** Shows a comparison, whose run the session has already, and returns it as a sentence. */
export function show({ psnr_db, ssim, shared_noise }) {
  byId("likeness-name").textContent = "How alike the images are";
  const psnr = mean(psnr_db);
  const alike = mean(ssim);
  facts([
    ["PSNR", spread(psnr_db, 1, " dB", "sizes differ"), psnr === undefined ? "" : psnrInWords(psnr)],
    ["SSIM", spread(ssim, 3, "", psnr === undefined ? "sizes differ" : "the images are too small for it"), alike === undefined ? "" : ssimInWords(alike)],
    ...(shared_noise ? [] : [["Starting noise", "not the same", "Their shapes differ, so likeness says nothing about the student."]]),
  ]);
  return `${speed()} PSNR ${spread(psnr_db, 1, " decibels", "sizes differ")}.`;
}

/** Shows the models' speed-up and the session's runs, and returns them as a sentence. */
function speed() {
  const ratios = session.ratios(models);
  const section = byId("speedup").closest(".speed");
  history();
  dots(byId("spread"), ratios);
  if (!ratios.length) {
    section.classList.add("unknown");
    byId("speedup").textContent = "–";
    byId("speedup-note").textContent = "Not compared yet.";
    return "";
  }
  const { count, median, least, most, disturbed } = session.summary(ratios);
  section.classList.remove("unknown");
  section.classList.toggle("unsure", disturbed || count < session.ENOUGH);
  byId("speedup").textContent = times(median);
  const said = count === 1 ? "One run" : `Median of ${count} runs, ${times(least)}× to ${times(most)}×`;
  const disturbance = disturbed ? " They differ a lot: something else probably used the machine." : "";
  const caution = count < session.ENOUGH ? " Repeat it before you rely on it." : "";
  byId("speedup-note").textContent = `${said}, by device time.${disturbance}${caution}`;
  return `Speed-up ${times(median)} times. ${byId("speedup-note").textContent}`;
}

/** Shows where the time of a model that ran alone went, from the timings of each of its images. */
export function alone(timings) {
  byId("likeness-name").textContent = "Where the time went";
  const sum = (field) => timings.reduce((sum, image) => sum + image[field], 0);
  facts([
    ["Device time", duration(sum("device_ms"))],
    ["Waited at most", duration(Math.max(...timings.map(({ queue_ms }) => queue_ms)))],
    ["Evaluations each", timings[0].network_evaluations],
    ["Mean batch", (sum("mean_batch") / timings.length).toFixed(1)],
  ]);
}

function history() {
  const table = byId("history");
  for (const body of [...table.tBodies]) body.remove();
  const groups = session.groups();
  const several = groups.some(({ settings }) => settings.models !== groups[0].settings.models);
  for (const { settings, runs } of groups) {
    const body = table.createTBody();
    const head = document.createElement("th");
    head.colSpan = 4;
    head.scope = "rowgroup";
    const steps = several ? settings.named : settings.steps;
    head.textContent = `${steps.join(" / ")} steps, ${settings.n} ${settings.n === 1 ? "image" : "images"}`;
    body.insertRow().append(head);
    for (const { number, times: [first, second], ratio } of runs) {
      const row = body.insertRow();
      for (const cell of [number, duration(first), duration(second), ratio === null ? "–" : `${times(ratio)}×`]) row.insertCell().textContent = cell;
    }
  }
}

/** What a PSNR of 8-bit images means: exactly, as the error of a pixel, and by rule of thumb. */
export function psnrInWords(decibels) {
  if (decibels >= 100) return "The images are identical.";
  const error = 100 * 10 ** (-decibels / 20);
  const words =
    decibels < 20 ? "clearly different at a glance"
    : decibels < 25 ? "differences are plain to see"
    : decibels < 32 ? "alike but for details"
    : decibels < 40 ? "differences show on a close look"
    : "hardly to be told apart";
  return `Pixels differ by ${error.toPrecision(2)} % of the range (root mean square): ${words}. Higher is better.`;
}

/** What an SSIM means, by rule of thumb. */
export function ssimInWords(value) {
  const words =
    value < 0.5 ? "different structure"
    : value < 0.8 ? "part of the structure is shared"
    : value < 0.95 ? "similar structure"
    : "almost the same structure";
  return `Likeness of structure, 1 is identical: ${words}.`;
}

function facts(rows) {
  byId("facts").replaceChildren(
    ...rows.map(([name, value, meaning]) => {
      const row = document.createElement("div");
      const term = document.createElement("dt");
      const text = document.createElement("dd");
      term.textContent = name;
      text.textContent = value;
      row.append(term, text);
      if (meaning) {
        const words = document.createElement("dd");
        words.className = "meaning";
        words.textContent = meaning;
        row.append(words);
      }
      return row;
    }),
  );
}

function mean(values) {
  const known = values.filter((value) => value !== null);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : undefined;
}

/** The mean, with the least and the most where there are several; `missing` where there are none. */
function spread(values, digits, unit, missing) {
  const known = values.filter((value) => value !== null);
  if (!known.length) return missing;
  const told = mean(values).toFixed(digits) + unit;
  if (known.length === 1) return told;
  return `${told} (${Math.min(...known).toFixed(digits)} to ${Math.max(...known).toFixed(digits)})`;
}
