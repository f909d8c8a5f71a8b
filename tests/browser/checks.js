// What must be true of the page. Each check is a fact; what it returns is told beside its name.

import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";

import { STEPS, STUDENT, TEACHER, THIRD } from "./server.js";

const REFUSED = /Failed to load resource: the server responded with a status of 4\d\d/;
const GONE = /Failed to load resource: net::ERR_|net::ERR_INCOMPLETE_CHUNKED_ENCODING|net::ERR_CONNECTION/;

const text = (page, selector) => page.locator(selector).textContent();
const rows = (page) => page.locator("#history td:first-child");
const said = (page, pattern) => page.locator("#problem").filter({ hasText: pattern }).waitFor();
const images = (page, side) => page.locator(`.${side} .board img`);
const sources = (page, side) => images(page, side).evaluateAll((all) => all.map(({ src }) => src));

async function api(base, path, body) {
  const request = body && { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  return (await fetch(base + path, request)).json();
}

/** A metric's sum over its series. */
async function metric(base, name) {
  const lines = (await (await fetch(`${base}/metrics`)).text()).split("\n");
  return lines.filter((line) => line.startsWith(`${name}{`)).reduce((sum, line) => sum + Number(line.split(" ").pop()), 0);
}

/** Does what starts a comparison, and waits for its end. */
async function compared(page, action = () => page.click("#run")) {
  const before = await rows(page).count();
  await action();
  await rows(page).nth(before).waitFor({ state: "attached" });
  await page.getByRole("button", { name: "Compare" }).waitFor({ state: "attached" });
}

/** The runs that the page lists, the latest first: number, times in milliseconds, speed-up. */
async function history(page) {
  const cells = await page.locator("#history tbody tr:has(td)").evaluateAll((rows) => rows.map((row) => [...row.cells].map((cell) => cell.textContent)));
  const milliseconds = (text) => parseFloat(text) * (text.endsWith(" ms") ? 1 : 1000);
  return cells.map(([number, first, second, ratio]) => ({ number: Number(number), first: milliseconds(first), second: milliseconds(second), ratio: parseFloat(ratio) }));
}

async function until(condition, what, seconds = 20) {
  const end = performance.now() + seconds * 1000;
  while (!(await condition())) {
    assert(performance.now() < end, `never: ${what}`);
    await new Promise((wake) => setTimeout(wake, 50));
  }
}

export async function a_text_model_has_a_prompt_its_examples_and_a_link_that_restores_it(world) {
  const { base } = await world.start("text");
  const page = await world.open({ base });
  const examples = await page.locator("#examples option").evaluateAll((all) => all.map(({ value }) => value));
  assert(examples.length > 3, examples.join());
  assert.equal(await page.inputValue("#prompt"), examples[0]);
  const first = await sources(page, "teacher");
  await page.fill("#prompt", "dog face, noto style");
  await compared(page);
  const drawn = await sources(page, "teacher");
  assert.notDeepEqual(drawn, first);
  const sizes = await images(page, "student").evaluateAll((all) => all.map(({ naturalWidth }) => naturalWidth));
  assert(sizes.every((width) => width === 64), sizes.join());
  await world.shot(page, "prompt");
  const again = await world.open({ base, path: `/${new URL(page.url()).search}` });
  assert.equal(await again.inputValue("#prompt"), "dog face, noto style");
  assert.deepEqual(await sources(again, "teacher"), drawn);
  assert.deepEqual(await world.faults(again), []);
  // Longer than its text encoder takes: the reply says how many tokens there are.
  world.expected = REFUSED;
  await again.fill("#prompt", "a ".repeat(100));
  await again.click("#run");
  await said(again, /100 tokens/);
  return examples.join("; ");
}

export async function all_files_together_stay_below_100_KB(world) {
  const page = await world.open({ ready: false });
  await page.waitForLoadState("networkidle").catch(() => {});
  const names = await page.evaluate(() => performance.getEntriesByType("resource").map(({ name }) => name));
  const files = [world.base + "/", ...new Set(names.filter((name) => name.includes("/web/")))];
  assert(files.length >= 7, files.join(" "));
  let bytes = 0;
  for (const file of files) {
    const reply = await fetch(file);
    assert.equal(reply.status, 200, file);
    bytes += (await reply.arrayBuffer()).byteLength;
  }
  assert(bytes < 100_000, `${bytes} bytes`);
  return `${bytes} bytes in ${files.length} files`;
}

// How soon the page can be used is a matter of rounds: what the document itself names is asked for at once.
// The time is the machine's, so it is told and not held.
export async function the_page_is_interactive_after_one_round_of_requests(world) {
  const page = await world.open({ path: "/?steps=1,1&n=1" });
  const times = [];
  while (times.length < 5) {
    await page.reload();
    await page.locator("#fields:enabled").waitFor();
    await rows(page).first().waitFor({ state: "attached" });
    const { needed, named, time } = await page.evaluate(() => {
      const time = performance.getEntriesByName("interactive")[0].startTime;
      const before = performance.getEntriesByType("resource").filter(({ startTime }) => startTime < time);
      const needed = before.map(({ name }) => name).filter((name) => /\/web\/|\/v1\//.test(name));
      const named = [...document.querySelectorAll("head [href], head [src]")].map((element) => element.href || element.src);
      return { needed, named, time };
    });
    assert(needed.length >= 10 && needed.some((name) => name.endsWith("/v1/models")), needed.join(" "));
    assert.deepEqual(needed.filter((name) => !named.includes(name)), [], "asked for in a second round");
    times.push(time);
  }
  times.sort((a, b) => a - b);
  return `${times[0].toFixed(0)} ms at best, ${times[2].toFixed(0)} ms in the middle of ${times.length} loads`;
}

export async function the_first_visit_runs_one_comparison(world) {
  const page = await world.open();
  assert.equal(await rows(page).count(), 1);
  assert.equal(await text(page, "#title"), `${TEACHER} and its student ${STUDENT}`);
  assert.equal(await images(page, "teacher").count(), 4);
  assert.equal(await images(page, "student").count(), 4);
  const note = await text(page, "#speedup-note");
  assert.equal(note, "One run, by device time. Repeat it before you rely on it.");
  assert(await page.locator(".speed.unsure").isVisible());
  const fold = await page.evaluate(() => ["#title", "#speedup", "#speedup-note", "#history"].map((name) => document.querySelector(name).getBoundingClientRect().bottom));
  assert(fold.every((bottom) => bottom < 900), `below the fold: ${fold}`);
  await world.shot(page, "desktop-first-visit");
  return `speed-up ${await text(page, "#speedup")}`;
}

export async function a_comparison_shows_what_the_API_says(world) {
  const page = await world.open();
  await page.selectOption("#class", { label: "Ankle boot" });
  await page.fill("#seed", "11");
  await page.selectOption("#count", "4");
  await page.evaluate(() => {
    window.seen = { teacher: new Set(), student: new Set() };
    for (const side of ["teacher", "student"]) {
      const look = () => {
        const image = document.querySelector(`.${side} .board img`);
        if (image) window.seen[side].add(image.src);
      };
      const board = document.querySelector(`.${side} .board`);
      new MutationObserver(look).observe(board, { childList: true, subtree: true, attributeFilter: ["src"] });
    }
  });
  await compared(page);
  const seen = await page.evaluate(() => [window.seen.teacher.size, window.seen.student.size]);
  assert.deepEqual(seen, [4, 4], "three previews and the image of either side");

  const request = { class_label: 9, seed: 11, n: 4 };
  const reply = await api(world.base, "/v1/compare", request);
  for (const [side, { data }] of [["teacher", reply.pair[0]], ["student", reply.pair[1]]]) {
    const expected = data.map(({ b64_json }) => `data:image/png;base64,${b64_json}`);
    assert.deepEqual(await sources(page, side), expected, `${side}'s images`);
    assert.match(await images(page, side).nth(2).getAttribute("alt"), /^Ankle boot, seed 13, by clothes-\w+$/);
  }
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const facts = await text(page, "#facts");
  const psnr = mean(reply.psnr_db);
  assert(facts.includes(`${psnr.toFixed(1)} dB (`), facts);
  assert(facts.includes(`${mean(reply.ssim).toFixed(3)} (`), facts);
  assert(facts.includes(`Pixels differ by ${(100 * 10 ** (-psnr / 20)).toPrecision(2)} % of the range`), facts);
  assert.match(await text(page, "#status"), /^Speed-up .* times\. .*by device time\..* PSNR .* decibels( \(.*\))?\.$/);
  assert.match(await text(page, ".side.teacher .note"), new RegExp(`^${TEACHER}: ${STEPS[TEACHER]} evaluations`));
  assert.match(await text(page, ".side.student .note"), new RegExp(`^${STUDENT}: ${STEPS[STUDENT]} evaluations`));
  await world.shot(page, "desktop-done");
  return `speed-up ${await text(page, "#speedup")}, ${facts}`;
}

/** One definition of time: what stands beside the images, in the list of runs and in the speed-up comes from the
    same device times, those of the server's reply. */
export async function every_speed_up_comes_from_the_same_times(world) {
  const page = await world.open();
  await page.evaluate(() => {
    const parse = JSON.parse;
    window.events = [];
    JSON.parse = (text) => {
      const value = parse(text);
      if (value.type === "compare.completed") window.events.push(value);
      return value;
    };
  });
  await compared(page, async () => {
    await compared(page);
    await page.click("#run");
  });
  const events = await page.evaluate(() => window.events);
  assert.equal(events.length, 2);
  const runs = await history(page);
  assert.deepEqual(runs.map(({ number }) => number), [3, 2, 1], "the latest first");
  const near = (a, b) => Math.abs(a / b - 1) < 0.006;
  for (const [at, { timings, speedup }] of events.reverse().entries()) {
    const { first, second, ratio } = runs[at];
    assert(near(first, timings[0].device_ms) && near(second, timings[1].device_ms), JSON.stringify([runs[at], timings]));
    assert(near(ratio, speedup.device) && near(ratio, first / second), JSON.stringify([runs[at], speedup]));
  }
  const clock = async (side) => text(page, `.${side} .clock`);
  const latest = await page.locator("#history tbody tr:has(td)").first().locator("td").allTextContents();
  assert.deepEqual([await clock("teacher"), await clock("student")], latest.slice(1, 3), "the clocks tell the latest run");
  const ratios = runs.map(({ ratio }) => ratio).sort((a, b) => a - b);
  assert.equal(Number(await text(page, "#speedup")), ratios[1], "the median of three");
  const note = await text(page, "#speedup-note");
  assert(note.startsWith(`Median of 3 runs, ${ratios[0].toFixed(2)}× to ${ratios[2].toFixed(2)}×, by device time.`), note);
  assert.equal(await page.locator("#spread .dots").count(), 1);
  // Nothing else on the page calls itself a speed-up, and the wall's clock is nowhere.
  const body = await page.locator("main").innerText();
  assert(!/end to end|wall/i.test(body), body);
  return `${runs.map(({ ratio }) => ratio).join(", ")}: ${note}`;
}

export async function repeating_makes_a_median_and_other_settings_another(world) {
  const page = await world.open({ path: "/?steps=6,3&n=1" });
  await page.click("#repeat");
  await page.getByRole("button", { name: "5 more runs" }).waitFor();
  assert.equal((await history(page)).length, 6);
  const said = await text(page, "#speedup-note");
  assert.match(said, /^Median of 6 runs, /);
  assert.equal(await page.locator(".speed.unsure").isVisible(), said.includes("differ a lot"), "six runs are enough unless they disagree");
  await world.shot(page, "desktop-repeated");
  await page.locator(".teacher .steps").fill("12");
  await compared(page);
  assert.match(await text(page, "#speedup-note"), /^One run/, "runs with other settings are not mixed");
  const groups = await page.locator("#history [scope=rowgroup]").allTextContents();
  assert.deepEqual(groups, ["ddim 12 / ddim 3 steps, 1 image", "ddim 6 / ddim 3 steps, 1 image"]);
  await page.click("#repeat");
  await page.getByRole("button", { name: "Stop" }).click();
  await page.getByRole("button", { name: "5 more runs" }).waitFor();
  assert.equal(await text(page, "#problem"), "");
}

export async function steps_and_samplers_are_each_sides_own(world) {
  const page = await world.open();
  await page.locator(".teacher .steps").fill("12");
  await page.locator(".student .steps").fill("3");
  await page.locator(".student .sampler").selectOption("heun");
  await compared(page);
  assert.match(await text(page, ".side.teacher .note"), /: 12 evaluations/);
  assert.match(await text(page, ".side.student .note"), /: 5 evaluations/, "Heun takes two per step but the last");
}

export async function the_same_seed_gives_the_same_images_and_another_seed_others(world) {
  const page = await world.open({ path: "/?steps=8,4" });
  const seen = [];
  for (const button of ["#run", "#run", "#reseed"]) {
    await compared(page, () => page.click(button));
    seen.push(JSON.stringify([await sources(page, "teacher"), await sources(page, "student")]));
  }
  assert.equal(seen[0], seen[1]);
  assert.notEqual(seen[0], seen[2]);
}

export async function a_link_restores_the_state(world) {
  const page = await world.open();
  await page.selectOption("#class", { label: "Bag" });
  await page.fill("#seed", "21");
  await page.selectOption("#count", "9");
  await page.locator(".teacher .steps").fill("14");
  await page.locator(".student .steps").fill("5");
  await page.locator(".student .sampler").selectOption("dpm++");
  await page.getByRole("radio", { name: "Overlay" }).check();
  await compared(page);
  const link = page.url();
  assert.equal(link, `${world.base}/?models=${TEACHER},${STUDENT}&steps=14,5&samplers=ddim,dpm%2B%2B&class=8&seed=21&n=9&view=over`);
  const seen = [await sources(page, "teacher"), await sources(page, "student")];
  const other = await world.open({ path: link.slice(world.base.length) });
  assert.deepEqual([await sources(other, "teacher"), await sources(other, "student")], seen);
  assert(await other.locator("#stage.over").isVisible());
  assert.equal(await other.locator(".student .sampler").inputValue(), "dpm++");
  const odd = await world.open({ path: "/?models=nobody,clothes-student&seed=x&steps=0,3&samplers=magic&class=77&n=2" });
  const problem = await text(odd, "#problem");
  for (const word of ["the model nobody", "seed = x", "steps = 0", "sampler = magic", "class = 77", "n = 2"]) assert(problem.includes(word), problem);
  assert.equal(await odd.locator(".student .steps").inputValue(), "3", "what can be had is had");
  return link;
}

export async function what_is_copied_works_when_pasted(world) {
  const page = await world.open({ path: "/?steps=6,3&n=4&class=9&seed=5", permissions: ["clipboard-read", "clipboard-write"] });
  const expected = [await sources(page, "teacher"), await sources(page, "student")].map((side) => side.map((source) => source.split(",")[1]));
  const copied = async (name) => {
    await page.getByRole("button", { name }).click();
    await page.locator("#copied").filter({ hasText: "copied" }).waitFor();
    const pasted = await page.evaluate(() => navigator.clipboard.readText());
    assert.equal(await text(page, "#snippet"), pasted);
    return pasted;
  };
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "understudy-pasted-"));
  const link = await copied("Copy link");
  assert.equal(link, `${world.base}/?models=${TEACHER},${STUDENT}&steps=6,3&samplers=ddim,ddim&class=9&seed=5&n=4`);

  execFileSync("sh", ["-c", await copied("Copy as curl")], { cwd: folder });
  const reply = JSON.parse(fs.readFileSync(path.join(folder, "images.json")));
  assert.deepEqual(reply.pair.map(({ data }) => data.map(({ b64_json }) => b64_json)), expected);

  const said = execFileSync("python3", ["-c", await copied("Copy as Python")], { cwd: folder, encoding: "utf8" });
  assert.match(said, /^speed-up by device time: [\d.]+$/m);
  for (const [side, model] of [TEACHER, STUDENT].entries()) {
    const files = [5, 6, 7, 8].map((seed) => fs.readFileSync(path.join(folder, `${model}-${seed}.png`), "base64"));
    assert.deepEqual(files, expected[side], model);
  }
  await world.shot(page, "desktop-reproduce");
  fs.rmSync(folder, { recursive: true });
}

/** Chromium gives no page from another machine over plain HTTP a clipboard. */
export async function without_a_clipboard_the_text_is_selected(world) {
  const page = await world.open({ path: "/?steps=2,1" });
  await page.evaluate(() => Object.defineProperty(navigator, "clipboard", { value: undefined }));
  await page.click("#copy-curl");
  await page.locator("#copied").filter({ hasText: "press Ctrl+C" }).waitFor();
  assert.equal(await page.evaluate(() => getSelection().toString().trim()), (await text(page, "#snippet")).trim());
}

export async function images_are_downloaded_as_the_server_sent_them(world) {
  const page = await world.open({ path: "/?steps=4,2&n=1&seed=3" });
  const save = async (side) => {
    const [download] = await Promise.all([page.waitForEvent("download"), page.locator(`.${side} .download`).click()]);
    return [download.suggestedFilename(), fs.readFileSync(await download.path())];
  };
  const [name, bytes] = await save("student");
  assert.equal(name, `${STUDENT}-seed-3.png`);
  assert.equal(bytes.toString("base64"), (await sources(page, "student"))[0].split(",")[1]);
  await page.selectOption("#count", "9");
  await compared(page);
  const [sheet, picture] = await save("teacher");
  assert.equal(sheet, `${TEACHER}-seed-3-to-11.png`);
  assert.deepEqual([picture.readUInt32BE(16), picture.readUInt32BE(20)], [96, 96], "three by three of 32 pixels");
  return `${name}, ${sheet}`;
}

export async function scores_of_a_card_are_explained(world) {
  const page = await world.open({ path: "/?steps=4,2" });
  const card = page.locator("#cards .student");
  const said = await card.innerText();
  const { scores } = (await api(world.base, "/v1/models")).data.find(({ id }) => id === STUDENT);
  assert(said.includes("Scores of 2,000 images, 20 steps of ddim, against Fashion-MNIST"), said);
  for (const [label, value, words] of [
    ["Fréchet distance lower is better", scores["FD-fashion-mnist-judge"], "It is not FID."],
    ["Inception score higher is better", scores.inception_score, `± ${scores.inception_score_deviation.toPrecision(2)}`],
    ["PSNR higher is better", scores.psnr_db, "at 26 dB by 5 %"],
    ["Recall higher is better", scores.recall, "variety"],
  ]) {
    assert(said.includes(label) && said.includes(words), `${label}: ${said}`);
    assert(said.includes(new Intl.NumberFormat("en", { maximumSignificantDigits: 4 }).format(value)), `${value}: ${said}`);
  }
  assert((await page.locator("#cards .teacher").innerText()).includes(`understudy evaluate --model ${TEACHER}`));
}

export async function the_swipe_uncovers_one_image_above_the_other(world) {
  const page = await world.open();
  await page.getByRole("radio", { name: "Overlay" }).check();
  const board = async (side) => page.locator(`.${side} .board`).boundingBox();
  assert.deepEqual(await board("teacher"), await board("student"));
  const shape = () => page.locator(".student .board").evaluate((board) => getComputedStyle(board).clipPath);
  assert.equal(await shape(), "inset(0px 50% 0px 0px)");
  const { x, y, width, height } = await board("teacher");
  await page.mouse.move(x + width / 2, y + height / 2);
  await page.mouse.down();
  await page.mouse.move(x + width * 0.8, y + height / 2);
  await page.mouse.up();
  assert.match(await shape(), /^inset\(0px (19|20|21)% 0px 0px\)$/);
  await page.keyboard.press("Home");
  assert.equal(await shape(), "inset(0px 100% 0px 0px)");
  await page.keyboard.press("PageUp");
  await world.shot(page, "desktop-overlay");
}

export async function the_keyboard_alone_does_everything(world) {
  const page = await world.open();
  const visited = [];
  const tab = async (last) => {
    for (let steps = 0; steps < 30; steps += 1) {
      await page.keyboard.press("Tab");
      const focus = await page.evaluate(() => {
        const at = document.activeElement;
        const outlined = at.closest(".views label, .swipe")?.querySelector("span") ?? at;
        const style = getComputedStyle(outlined, outlined.matches(".divider") ? "::after" : null);
        return { id: at.id || at.value || at.className || at.textContent, outline: parseFloat(style.outlineWidth), name: at.tagName };
      });
      assert(focus.outline >= 2, `${focus.name} ${focus.id} shows its focus`);
      visited.push(focus.id);
      if (focus.id === last) return;
    }
    assert.fail(`never reached ${last}: ${visited}`);
  };
  await tab("class");
  await page.keyboard.type("Bag");
  await tab("seed");
  await page.keyboard.press("Control+A");
  await page.keyboard.type("21");
  await tab("run");
  await compared(page, () => page.keyboard.press("Enter"));
  assert.match(await images(page, "student").first().getAttribute("alt"), /^Bag, seed 21,/);
  await tab("beside");
  await page.keyboard.press("ArrowRight");
  assert(await page.locator("#stage.over").isVisible(), "the arrow chooses the overlay");
  await tab("cut");
  await page.keyboard.press("ArrowLeft");
  assert.equal(await page.locator("#cut").inputValue(), "49");
  return visited.join(", ");
}

export async function everything_that_can_be_used_has_a_name(world) {
  const page = await world.open();
  await page.locator("summary").click();
  await page.getByRole("radio", { name: "Overlay" }).check();
  const tree = await page.locator("body").ariaSnapshot();
  const roles = /^\s*- (button|textbox|combobox|spinbutton|slider|radio|link|table|timer)\b(.*)$/gm;
  const nameless = [...tree.matchAll(roles)].filter(([, , rest]) => !rest.includes('"')).map(([line]) => line.trim());
  assert.deepEqual(nameless, []);
  assert(tree.includes("slider"), tree);
  assert.equal(await page.locator("[role=alert], [role=status]").count(), 3, "live regions");
  assert.equal(await page.locator("html[lang]").count(), 1);
}

/** WCAG 2.2, 1.4.3: 4.5 to 1, and 3 to 1 for large text. */
export async function text_stands_out_in_light_and_in_dark(world) {
  const least = {};
  for (const colorScheme of ["light", "dark"]) {
    const page = await world.open({ colorScheme, reducedMotion: "reduce" });
    await page.locator("summary").click();
    const found = await world.contrasts(page);
    assert(found.length > 20);
    const faint = found.filter(({ ratio, large }) => ratio < (large ? 3 : 4.5));
    assert.deepEqual(faint, []);
    least[colorScheme] = Math.min(...found.map(({ ratio }) => ratio)).toFixed(1);
    await page.locator("summary").click();
    await world.shot(page, `desktop-${colorScheme}`);
  }
  return `least contrast ${least.light} in light, ${least.dark} in dark`;
}

/** WCAG 2.2, 2.5.5 (AAA): 44 pixels each way. A link or a control inside a label may be hit there. */
async function targets(page) {
  const found = page.locator("a:visible, button:visible, select:visible, input:visible, summary:visible");
  for (const target of await found.all()) {
    const { width, height } = await target.boundingBox();
    assert(height >= 44 && width >= 44, `${await target.evaluate((element) => element.outerHTML)} is ${width}×${height}`);
  }
}

export async function a_phone_shows_the_speed_up_at_once(world) {
  const tops = {};
  for (const colorScheme of ["light", "dark"]) {
    const page = await world.open({ width: 360, height: 640, deviceScaleFactor: 2, colorScheme, hasTouch: true, isMobile: true });
    const fits = async (what) => {
      const width = await page.evaluate(() => document.documentElement.scrollWidth);
      assert(width <= 360, `${what}: ${width} pixels wide`);
    };
    await fits("first visit");
    const inSight = await page.evaluate(() => ["#title", "#speedup", "#speedup-note", "#run"].map((name) => [name, document.querySelector(name).getBoundingClientRect().bottom]));
    for (const [name, bottom] of inSight) assert(bottom <= 640, `${name} ends at ${bottom}`);
    tops[colorScheme] = inSight.map(([name, bottom]) => `${name} ${Math.round(bottom)}`).join(", ");
    const cut = await page.evaluate(() =>
      [...document.querySelectorAll("h1, h2, h3, th, td, .note, .who, button, summary, a")]
        .filter((element) => element.checkVisibility() && !element.closest(".hidden") && element.scrollWidth > element.clientWidth + 1 && getComputedStyle(element).display !== "inline")
        .map((element) => `${element.tagName} ${element.textContent}`));
    assert.deepEqual(cut, [], "names are not cut");
    await world.shot(page, `phone-first-visit-${colorScheme}`);
    await page.selectOption("#count", "9");
    await compared(page, () => page.locator("#run").tap());
    await fits("done");
    await page.getByRole("radio", { name: "Overlay" }).tap();
    await fits("overlay");
    await targets(page);
    await page.locator("#copy-python").tap();
    await fits("snippet");
    await page.locator("summary").tap();
    await fits("key");
    await targets(page);
    await world.shot(page, `phone-overlay-${colorScheme}`);
  }
  return tops.light;
}

export async function with_three_models_each_side_chooses_and_no_name_is_cut(world) {
  const { base } = await world.start("trio");
  const page = await world.open({ base, path: "/?n=1", width: 360, height: 740, deviceScaleFactor: 2, hasTouch: true, isMobile: true });
  assert.equal(await text(page, "#title"), `${TEACHER} and its student ${STUDENT}`);
  await page.locator(".student .model select").selectOption(THIRD);
  assert.equal(await text(page, "#title"), `${TEACHER} and ${THIRD}`);
  assert.equal(await text(page, "#speedup-note"), "Not compared yet.", "a speed-up is that of the models that are named");
  assert.equal(await images(page, "teacher").count(), 0);
  await compared(page);
  assert.match(await text(page, "#speedup-note"), /^One run/);
  const room = await page.locator(".student .model select").evaluate((select) => {
    const style = getComputedStyle(select);
    const context = document.createElement("canvas").getContext("2d");
    context.font = `${style.fontWeight} ${style.fontSize} ${style.fontFamily}`;
    return select.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight) - context.measureText(select.value).width;
  });
  assert(room >= 0, `the name lacks ${-room} pixels`);
  await world.shot(page, "phone-three-models");
  await page.locator(".student .model select").selectOption(STUDENT);
  assert.match(await text(page, "#speedup-note"), /^One run/, "the session remembers the pair before");
}

export async function another_model_ends_the_run_that_is_under_way(world) {
  const { base } = await world.start("trio");
  const page = await world.open({ base, path: "/?n=9" });
  await page.locator(".teacher .steps").fill("1000");
  await page.click("#run");
  await until(() => metric(base, "understudy_samples_running"), "the comparison runs");
  await page.locator(".student .model select").selectOption(THIRD);
  await page.getByRole("button", { name: "Compare" }).waitFor();
  await until(async () => (await metric(base, "understudy_samples_running")) === 0, "the samples leave");
  assert.equal(await text(page, "#problem"), "");
  for (const side of ["teacher", "student"]) assert.equal(await images(page, side).count(), 0, `nothing is shown under another name: ${side}`);
  await page.locator(".teacher .steps").fill("2");
  await compared(page);
}

export async function the_strip_follows_the_servers_metrics(world) {
  const { base } = await world.start("pair");
  const page = await world.open({ base, path: "/?steps=4,2&n=1" });
  await page.locator(".live.on").waitFor();
  await page.locator("#latency tr").nth(1).waitFor();
  const cells = (row) => page.locator("#latency tr").nth(row).locator("td").allTextContents();
  const count = async (row) => Number((await cells(row))[0]);
  await until(() => metric(base, "understudy_request_duration_seconds_count"), "the first visit's comparison is counted");
  const before = await count(0);
  const ask = (n) => Promise.all(Array.from({ length: n }, (_, seed) => api(base, "/v1/images/generations", { model: TEACHER, seed, num_inference_steps: 2 })));
  await ask(1);
  await until(async () => (await count(0)) >= before + 1, "the request is counted");
  assert.deepEqual((await cells(0)).slice(1), ["–", "–", "–"], "no percentiles of one request");
  assert.match(await text(page, "#latency-note"), /p50 from 10, p95 from 100, p99 from 500\.$/);
  await ask(12);
  await until(async () => (await count(0)) >= before + 13, "the requests are counted");
  const twelve = await cells(0);
  assert.match(twelve[1], /^[\d.]+ m?s$/, twelve.join());
  assert.deepEqual(twelve.slice(2), ["–", "–"], "no p95 of a dozen");
  for (let round = 0; round < 6; round += 1) await ask(16);
  await until(async () => (await count(0)) >= before + 109, "the requests are counted");
  const hundred = await cells(0);
  assert.match(hundred[2], /^[\d.]+ m?s$/, hundred.join());
  assert.equal(hundred[3], "–", "no p99 of a hundred");
  assert.match(await text(page, "#batch"), /^\d+\.\d$/);
  assert.match(await page.locator("#latency-chart").getAttribute("aria-label"), new RegExp(`^Latest mean latency: ${TEACHER} [\\d.]+ m?s`));
  assert.equal(await page.locator("#latency-chart .dots.of-0").count(), 1);
  await page.locator(".live").scrollIntoViewIfNeeded();
  await world.shot(page, "desktop-live");
  const running = until(async () => Number(await text(page, "#running")) + Number(await text(page, "#waiting")) > 0, "something runs");
  await page.locator(".teacher .steps").fill("900");
  await page.selectOption("#count", "4");
  await page.click("#run");
  await running;
  await page.click("#run");
  return `requests, p50, p95, p99: ${hundred.join(", ")}`;
}

export async function stop_frees_what_was_under_way(world) {
  const page = await world.open();
  await page.locator(".teacher .steps").fill("1000");
  await page.selectOption("#count", "9");
  await page.click("#run");
  await until(() => metric(world.base, "understudy_samples_running"), "the comparison runs");
  assert.equal(await text(page, "#run"), "Stop");
  await page.click("#run");
  await page.getByRole("button", { name: "Compare" }).waitFor();
  assert.equal(await text(page, "#status"), "Stopped.");
  assert.equal(await text(page, "#problem"), "");
  await until(async () => (await metric(world.base, "understudy_samples_running")) === 0, "the samples leave");
}

export async function a_refusal_is_shown_in_the_servers_words(world) {
  world.expected = REFUSED;
  const server = await world.start("pair", "--max-images-per-request=4");
  const page = await world.open({ base: server.base });
  await page.selectOption("#count", "16");
  await page.click("#run");
  await said(page, /\bn\b.*16.*4/);
  const { error } = await api(server.base, "/v1/compare", { n: 16 });
  const shown = await text(page, "#problem");
  assert.equal(shown.toLowerCase(), `${error.message.replaceAll("`", "")}${/[.!?]$/.test(error.message) ? "" : "."}`.toLowerCase());
  await world.shot(page, "desktop-refused");
  await page.selectOption("#count", "4");
  await compared(page);
  assert.equal(await text(page, "#problem"), "", "the next success takes it away");
  return shown;
}

export async function a_number_out_of_range_is_not_sent(world) {
  const page = await world.open();
  let sent = 0;
  page.on("request", (request) => (sent += request.method() === "POST"));
  for (const [field, value] of [["#seed", "-1"], ["#seed", ""], [".student .steps", "0"], [".student .steps", "1001"]]) {
    const before = await page.locator(field).inputValue();
    await page.locator(field).fill(value);
    await page.click("#run");
    assert(await page.locator(field).evaluate((input) => input.matches(":user-invalid, :invalid")), `${field} ${value}`);
    await page.locator(field).fill(before);
  }
  assert.equal(sent, 0);
}

export async function a_server_killed_in_the_middle_is_told_and_can_come_back(world) {
  world.expected = GONE;
  const server = await world.start("pair");
  const page = await world.open({ base: server.base });
  await page.locator(".live.on").waitFor();
  await page.locator(".teacher .steps").fill("1000");
  await page.selectOption("#count", "4");
  await page.click("#run");
  await images(page, "student").first().waitFor();
  await server.kill();
  await said(page, /broke off before the images were finished/);
  await page.getByRole("button", { name: "Compare" }).waitFor();
  assert.equal(await text(page, ".teacher .clock"), "", "no time is told of what did not finish");
  await page.locator(".live:not(.on)").waitFor();
  assert.match(await text(page, "#live-note"), /cannot be reached/);
  await world.shot(page, "desktop-broken");
  await page.click("#run");
  await said(page, /cannot be reached/);
  await world.start("pair", `--port=${new URL(server.base).port}`);
  await page.locator(".live.on").waitFor();
  await page.locator("#fields:enabled").waitFor();
  await page.locator(".teacher .steps").fill("10");
  await compared(page);
  assert.equal(await text(page, "#problem"), "");
}

export async function a_key_is_asked_for_and_kept_nowhere(world) {
  world.expected = REFUSED;
  const server = await world.start("pair", "--api-key=correct-horse", "--api-key-everywhere");
  const page = await world.open({ base: server.base, ready: false });
  await said(page, /API key/);
  assert.equal(await page.evaluate(() => document.activeElement.id), "key");
  assert.match(await text(page, "#live-note"), /API key/);
  await world.shot(page, "desktop-key");
  await page.keyboard.type("wrong");
  await page.keyboard.press("Enter");
  await said(page, /API key/);
  await page.locator("#key").fill("correct-horse");
  await page.keyboard.press("Enter");
  await page.locator("#fields:enabled").waitFor();
  await rows(page).first().waitFor({ state: "attached" });
  await compared(page);
  await page.locator(".live.on").waitFor();
  const kept = await page.evaluate(async () => [{ ...localStorage }, { ...sessionStorage }, document.cookie, (await indexedDB.databases()).length, location.href]);
  assert.deepEqual(kept.slice(0, 4), [{}, {}, "", 0]);
  assert(!kept[4].includes("correct"), kept[4]);
  await page.click("#copy-python");
  assert.match(await text(page, "#snippet"), /os\.environ\["UNDERSTUDY_API_KEY"\]/);
  assert(!(await page.content()).includes("correct-horse"));
  await page.reload();
  await said(page, /API key/);
}
