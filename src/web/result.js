// What a comparison found: the speed-up, and how alike the images are.

const byId = (id) => document.getElementById(id);

/** Milliseconds for people. */
export function duration(milliseconds) {
  if (milliseconds < 1) return `${milliseconds.toFixed(2)} ms`;
  if (milliseconds < 1000) return `${milliseconds.toPrecision(3)} ms`;
  return `${(milliseconds / 1000).toPrecision(3)} s`;
}

const times = (ratio) => (ratio === null ? "–" : ratio.toFixed(ratio < 10 ? 2 : 1));

const BEFORE = "The teacher’s device time over the student’s, once both are done.";

/** Forgets the result before. */
export function clear() {
  byId("stage").parentElement.classList.add("waiting");
  byId("speedup").textContent = "–";
  byId("speedup-note").textContent = BEFORE;
  byId("bars").replaceChildren();
  byId("facts").replaceChildren();
}

/** Shows a comparison, and returns it as a sentence. */
export function show({ speedup, psnr_db, ssim, shared_noise, timings }, [teacher, student]) {
  byId("stage").parentElement.classList.remove("waiting");
  byId("speedup").textContent = times(speedup.device);
  const than = `${teacher.toLowerCase()}’s device time over the ${student.toLowerCase()}’s`;
  byId("speedup-note").textContent = `The ${than}.`;
  bars(timings.map(({ device_ms }) => device_ms), [teacher, student]);
  facts([
    ["End to end, side by side", `${times(speedup.end_to_end)}×`],
    ["PSNR", spread(psnr_db, 1, " dB")],
    ["SSIM", spread(ssim, 3, "")],
    ["Same starting noise", shared_noise ? "yes" : "no: their shapes differ"],
  ]);
  return `Speed-up ${times(speedup.device)} times by device time. PSNR ${spread(psnr_db, 1, " decibels")}.`;
}

/** Shows where the time of a model that ran alone went, from the timings of each of its images. */
export function alone(timings) {
  const sum = (field) => timings.reduce((sum, image) => sum + image[field], 0);
  facts([
    ["Device time", duration(sum("device_ms"))],
    ["Waited at most", duration(Math.max(...timings.map(({ queue_ms }) => queue_ms)))],
    ["Evaluations each", timings[0].network_evaluations],
    ["Mean batch", (sum("mean_batch") / timings.length).toFixed(1)],
  ]);
}

function bars(milliseconds, names) {
  const longest = Math.max(...milliseconds);
  byId("bars").replaceChildren(
    ...milliseconds.map((value, side) => {
      const row = document.createElement("div");
      row.className = side ? "student" : "teacher";
      const bar = document.createElement("i");
      bar.style.setProperty("--share", (100 * value) / longest);
      row.append(`${names[side]}`, bar);
      return row;
    }),
  );
}

function facts(rows) {
  byId("facts").replaceChildren(
    ...rows.map(([name, value]) => {
      const row = document.createElement("div");
      const term = document.createElement("dt");
      const text = document.createElement("dd");
      term.textContent = name;
      text.textContent = value;
      row.append(term, text);
      return row;
    }),
  );
}

/** The mean, with the least and the most where there are several. */
function spread(values, digits, unit) {
  const known = values.filter((value) => value !== null);
  if (!known.length) return "sizes differ";
  const mean = known.reduce((sum, value) => sum + value, 0) / known.length;
  const told = mean.toFixed(digits) + unit;
  if (known.length === 1) return told;
  return `${told} (${Math.min(...known).toFixed(digits)} to ${Math.max(...known).toFixed(digits)})`;
}
