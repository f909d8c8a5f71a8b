// The comparisons since the page was opened, and what those with the same settings come to.

/** Fewer runs than this say little: one of them may have shared the machine with something else. */
export const ENOUGH = 3;

/** Runs were disturbed where the upper quartile is more than so many times the lower one. */
const DISTURBED = 1.3;

const runs = [];

/** Adds a run of a request: both sides' device times in milliseconds, and the first over the second. */
export function add({ models, num_inference_steps, scheduler, n }, [first, second], ratio) {
  const steps = num_inference_steps.map((count, side) => `${scheduler[side]} ${count}`);
  const named = steps.map((steps, side) => `${models[side]} ${steps}`);
  // Class and seed change the images, and not the work.
  const settings = { key: JSON.stringify([models, steps, n]), models: models.join(), steps, named, n };
  runs.push({ number: runs.length + 1, settings, times: [first, second], ratio });
}

/** Runs by settings, those with the latest run first; in each the latest run first. */
export function groups() {
  const groups = new Map();
  for (const run of [...runs].reverse()) {
    const group = groups.get(run.settings.key) ?? { settings: run.settings, runs: [] };
    group.runs.push(run);
    groups.set(run.settings.key, group);
  }
  return [...groups.values()];
}

/** The speed-ups of two models' latest run and of those with its settings, oldest first. */
export function ratios(models) {
  const latest = groups().find(({ settings }) => settings.models === models.join());
  return (latest?.runs ?? []).map(({ ratio }) => ratio).filter((ratio) => ratio !== null).reverse();
}

/** Median, least and most, and whether they differ too much to be relied on. */
export function summary(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const quantile = (q) => {
    const place = q * (sorted.length - 1);
    const [below, above] = [sorted[Math.floor(place)], sorted[Math.ceil(place)]];
    return below + (above - below) * (place % 1);
  };
  const disturbed = quantile(0.75) / quantile(0.25) > DISTURBED;
  return { count: sorted.length, median: quantile(0.5), least: sorted[0], most: sorted.at(-1), disturbed };
}
