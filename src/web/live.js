// The strip of what the server is doing, computed in the page from /metrics.

import { ask } from "./api.js";
import { between, histogram, parse, quantile, total } from "./exposition.js";
import { duration } from "./result.js";

const EVERY_MS = 1000;
const WINDOW_MS = 60_000;
const BATCH_WINDOW_MS = 10_000;
const REQUESTS = "understudy_request_duration_seconds";
const BATCH = "understudy_batch_samples";

const byId = (id) => document.getElementById(id);
const strip = document.querySelector(".live");

/** Scrapes of the last minute, oldest first. */
let scrapes = [];

/** Watches the server; `models` gives the ids whose latencies are told. */
export async function watch(models) {
  for (;;) {
    if (!document.hidden) await look(models());
    await new Promise((wake) => setTimeout(wake, EVERY_MS));
  }
}

async function look(models) {
  try {
    const metrics = parse(await (await ask("/metrics")).text());
    const now = {
      at: performance.now(),
      waiting: total(metrics, "understudy_samples_waiting"),
      running: total(metrics, "understudy_samples_running"),
      rows: total(metrics, `${BATCH}_sum`),
      evaluations: total(metrics, `${BATCH}_count`),
      latency: new Map(models.map((model) => [model, histogram(metrics, REQUESTS, model)])),
    };
    // A server that was started anew counts from zero.
    if (now.evaluations < scrapes.at(-1)?.evaluations) scrapes = [];
    scrapes = [...scrapes.filter(({ at }) => at >= now.at - WINDOW_MS), now];
    show(now, models);
    strip.classList.add("on");
    byId("live-note").textContent = "";
  } catch (problem) {
    scrapes = [];
    strip.classList.remove("on");
    byId("live-note").textContent =
      problem.status === 401 ? "The server asks for its API key here as well." : problem.message;
    for (const id of ["waiting", "running", "batch"]) byId(id).textContent = "–";
  }
}

function show(now, models) {
  byId("waiting").textContent = now.waiting;
  byId("running").textContent = now.running;
  const before = scrapes.find(({ at }) => at >= now.at - BATCH_WINDOW_MS);
  byId("batch").textContent = meanBatch(before, now)?.toFixed(1) ?? "–";
  sparkline("load", scrapes.map(({ waiting, running }) => waiting + running));
  sparkline("batches", scrapes.slice(1).map((scrape, before) => meanBatch(scrapes[before], scrape) ?? 0));
  const rows = models.map((model) => {
    const latency = between(scrapes[0].latency.get(model) ?? [], now.latency.get(model) ?? []);
    const quantiles = [0.5, 0.95, 0.99].map((q) => quantile(q, latency));
    const cells = quantiles.map((seconds) => (seconds === undefined ? "–" : duration(seconds * 1000)));
    return row(model, [...cells, latency.at(-1)?.[1] ?? 0]);
  });
  byId("latency").replaceChildren(...rows);
}

function meanBatch(before, after) {
  const evaluations = after.evaluations - before.evaluations;
  return evaluations ? (after.rows - before.rows) / evaluations : undefined;
}

function row(name, cells) {
  const row = document.createElement("tr");
  const head = document.createElement("th");
  head.scope = "row";
  head.textContent = head.title = name;
  row.append(head);
  for (const cell of cells) row.insertCell().textContent = cell;
  return row;
}

/** The values of the last minute as a line, the newest at the right. */
function sparkline(id, values) {
  const most = Math.max(1, ...values);
  const points = values.map((value, i) => `${60 - values.length + 1 + i},${19 - (18 * value) / most}`);
  let line = byId(id).firstChild;
  if (!line) line = byId(id).appendChild(document.createElementNS("http://www.w3.org/2000/svg", "polyline"));
  line.setAttribute("points", points.join(" "));
}
