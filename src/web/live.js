// What the server is doing, computed in the page from /metrics.

import { ask } from "./api.js";
import { lines, sparkline } from "./chart.js";
import { between, histogram, parse, quantile, total } from "./exposition.js";
import { duration } from "./result.js";

const EVERY_MS = 1000;
const WINDOW_MS = 300_000;
const LEAST_WINDOW_MS = 30_000;
const SPARK_MS = 60_000;
const BATCH_WINDOW_MS = 10_000;
const REQUESTS = "understudy_request_duration_seconds";
const BATCH = "understudy_batch_samples";

const QUANTILES = [0.5, 0.95, 0.99];

/** A quantile is told where at least five requests are expected to have taken longer. */
const least = (q) => Math.round(5 / (1 - q));

const byId = (id) => document.getElementById(id);
const strip = document.querySelector(".live");

/** Scrapes of the last minutes, oldest first. */
let scrapes = [];

/** Watches the server; `models` gives the ids whose latencies are told, `returned` is called when it is back. */
export async function watch(models, returned) {
  byId("latency-note").textContent =
    `From receipt to the last image, waiting included. A percentile is shown from enough requests: ${QUANTILES.map((q) => `p${100 * q} from ${least(q)}`).join(", ")}.`;
  for (;;) {
    if (!document.hidden) await look(models(), returned);
    await new Promise((wake) => setTimeout(wake, EVERY_MS));
  }
}

let gone = false;

async function look(models, returned) {
  try {
    const metrics = parse(await (await ask("/metrics")).text());
    const now = {
      at: performance.now(),
      waiting: total(metrics, "understudy_samples_waiting"),
      running: total(metrics, "understudy_samples_running"),
      rows: total(metrics, `${BATCH}_sum`),
      evaluations: total(metrics, `${BATCH}_count`),
      latency: new Map(models.map((model) => [model, histogram(metrics, REQUESTS, model)])),
      seconds: new Map(models.map((model) => [model, total(metrics, `${REQUESTS}_sum`, model)])),
    };
    // A server that was started anew counts from zero.
    if (now.evaluations < scrapes.at(-1)?.evaluations) scrapes = [];
    scrapes = [...scrapes.filter(({ at }) => at >= now.at - WINDOW_MS), now];
    show(now, models);
    strip.classList.add("on");
    byId("live-note").textContent = "";
    if (gone) returned();
    gone = false;
  } catch (problem) {
    gone ||= problem.status === 0;
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
  const lately = scrapes.filter(({ at }) => at >= now.at - SPARK_MS);
  sparkline(byId("load"), lately.map(({ waiting, running }) => waiting + running));
  sparkline(byId("batches"), lately.slice(1).map((scrape, before) => meanBatch(lately[before], scrape) ?? 0));
  const rows = models.map((model, at) => {
    const first = scrapes.find(({ latency }) => latency.has(model));
    const latency = between(first.latency.get(model), now.latency.get(model));
    const requests = latency.at(-1)?.[1] ?? 0;
    const cells = QUANTILES.map((q) => (requests >= least(q) ? duration(quantile(q, latency) * 1000) : "–"));
    return row(model, at, [requests, ...cells]);
  });
  byId("latency").replaceChildren(...rows);
  chart(now, models);
}

/** Mean latency by model and second, of the requests that ended then. */
function chart(now, models) {
  const span = Math.max(LEAST_WINDOW_MS, now.at - scrapes[0].at);
  byId("latency-from").textContent = span < 120_000 ? `${Math.round(span / 1000)} s ago` : `${Math.round(span / 60_000)} min ago`;
  const series = models.map((model) =>
    scrapes.slice(1).flatMap((scrape, before) => {
      // Which models are watched may have changed in between.
      if (![scrapes[before], scrape].every(({ latency }) => latency.has(model))) return [];
      const count = (at) => at.latency.get(model).at(-1)?.[1] ?? 0;
      const requests = count(scrape) - count(scrapes[before]);
      if (!(requests > 0)) return [];
      const seconds = scrape.seconds.get(model) - scrapes[before].seconds.get(model);
      return [[1 - (now.at - scrape.at) / span, (1000 * seconds) / requests]];
    }),
  );
  const most = Math.max(...series.flat().map(([, y]) => y));
  const known = Number.isFinite(most);
  lines(byId("latency-chart"), series, known ? most : 1);
  byId("latency-most").textContent = known ? duration(most) : "";
  const told = models.flatMap((model, at) => (series[at].length ? [`${model} ${duration(series[at].at(-1)[1])}`] : []));
  byId("latency-chart").ariaLabel = told.length ? `Latest mean latency: ${told.join(", ")}; highest ${duration(most)}` : "No requests in the last 5 minutes";
}

function meanBatch(before, after) {
  const evaluations = after.evaluations - before.evaluations;
  return evaluations ? (after.rows - before.rows) / evaluations : undefined;
}

function row(name, at, cells) {
  const row = document.createElement("tr");
  const head = document.createElement("th");
  head.scope = "row";
  head.className = `of-${at}`;
  head.textContent = name;
  row.append(head);
  for (const cell of cells) row.insertCell().textContent = cell;
  return row;
}
