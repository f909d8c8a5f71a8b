// Prometheus' text format, and quantiles of what happened between two scrapes of it.

const LINE = /^(\w+)(?:\{(.*)\})? (\S+)$/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** Series by metric name: arrays of `{labels, value}`. */
export function parse(text) {
  const metrics = new Map();
  for (const line of text.split("\n")) {
    const [, name, labels = "", value] = LINE.exec(line) ?? [];
    if (!name) continue;
    const series = { labels: Object.fromEntries([...labels.matchAll(LABEL)].map(([, k, v]) => [k, v])), value: Number(value) };
    if (metrics.has(name)) metrics.get(name).push(series);
    else metrics.set(name, [series]);
  }
  return metrics;
}

/** The sum over all series of a metric, or over one model's. */
export function total(metrics, name, model) {
  const series = metrics.get(name) ?? [];
  return series.reduce((sum, { labels, value }) => (!model || labels.model === model ? sum + value : sum), 0);
}

/** A model's histogram as `[upper bound, observations up to it]`, by bound. */
export function histogram(metrics, name, model) {
  return (metrics.get(`${name}_bucket`) ?? [])
    .filter(({ labels }) => labels.model === model)
    .map(({ labels, value }) => [labels.le === "+Inf" ? Infinity : Number(labels.le), value])
    .sort(([a], [b]) => a - b);
}

/** What was observed between two histograms of the same metric. */
export function between(before, after) {
  const earlier = new Map(before);
  return after.map(([bound, count]) => [bound, count - (earlier.get(bound) ?? 0)]);
}

/** The q-quantile as Prometheus' histogram_quantile gives it: linear inside a bucket; undefined if empty. */
export function quantile(q, buckets) {
  const count = buckets.at(-1)?.[1] ?? 0;
  if (!count) return undefined;
  const rank = q * count;
  const at = buckets.findIndex(([, upTo]) => upTo >= rank);
  const [lower, below] = at > 0 ? buckets[at - 1] : [0, 0];
  const [upper, upTo] = buckets[at];
  return upper === Infinity ? lower : lower + ((upper - lower) * (rank - below)) / (upTo - below);
}
