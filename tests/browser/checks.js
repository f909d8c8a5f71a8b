// What must be true of the page. Each check is a fact; what it returns is told beside its name.

import assert from "node:assert/strict";

import { STEPS, STUDENT, TEACHER } from "./server.js";

const REFUSED = /Failed to load resource: the server responded with a status of 4\d\d/;
const GONE = /Failed to load resource: net::ERR_|net::ERR_INCOMPLETE_CHUNKED_ENCODING|net::ERR_CONNECTION/;

const text = (page, selector) => page.locator(selector).textContent();
const done = (page) => page.locator(".show:not(.waiting)").waitFor();
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

async function until(condition, what, seconds = 20) {
  const end = performance.now() + seconds * 1000;
  while (!(await condition())) {
    assert(performance.now() < end, `never: ${what}`);
    await new Promise((wake) => setTimeout(wake, 50));
  }
}

export async function all_files_together_stay_below_60_KB(world) {
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
  assert(bytes < 60_000, `${bytes} bytes`);
  return `${bytes} bytes in ${files.length} files`;
}

export async function the_page_is_interactive_within_100_ms(world) {
  const page = await world.open();
  const times = [];
  for (let load = 0; load < 10; load += 1) {
    await page.reload();
    await page.locator("#fields:enabled").waitFor();
    times.push(await page.evaluate(() => performance.getEntriesByName("interactive")[0].startTime));
  }
  times.sort((a, b) => a - b);
  // The least, because a machine that does something else at the time is not the page's fault.
  assert(times[0] < 100, times.join(" "));
  return `${times[0].toFixed(0)} ms at best, ${times[5].toFixed(0)} ms in the middle of ten loads`;
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
  await world.shot(page, "desktop-idle");
  await page.click("#run");
  await done(page);
  const seen = await page.evaluate(() => [window.seen.teacher.size, window.seen.student.size]);
  assert.deepEqual(seen, [4, 4], "three previews and the image of either side");

  const request = { class_label: 9, seed: 11, n: 4 };
  const reply = await api(world.base, "/v1/compare", request);
  for (const [side, { data }] of [["teacher", reply.pair[0]], ["student", reply.pair[1]]]) {
    const expected = data.map(({ b64_json }) => `data:image/png;base64,${b64_json}`);
    assert.deepEqual(await sources(page, side), expected, `${side}'s images`);
    assert.match(await images(page, side).nth(2).getAttribute("alt"), /^Ankle boot, seed 13, by clothes-\w+$/);
    const clock = await text(page, `.${side} .clock`);
    assert.match(clock, /^\d+\.\d\d s$/);
    await new Promise((wake) => setTimeout(wake, 150));
    assert.equal(await text(page, `.${side} .clock`), clock, "the clock has stopped");
  }
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const facts = await text(page, "#facts");
  assert(facts.includes(`${mean(reply.psnr_db).toFixed(1)} dB (`), facts);
  assert(facts.includes(`${mean(reply.ssim).toFixed(3)} (`), facts);
  assert.match(await text(page, "#speedup"), /^\d+\.\d+$/);
  assert.match(await text(page, "#status"), /^Speed-up .* times by device time/);
  assert.match(await text(page, ".teacher .note"), new RegExp(`^${STEPS[TEACHER]} evaluations`));
  assert.match(await text(page, ".student .note"), new RegExp(`^${STEPS[STUDENT]} evaluations`));
  await world.shot(page, "desktop-done");
  return `speed-up ${await text(page, "#speedup")}, ${facts}`;
}

export async function steps_and_samplers_are_each_sides_own(world) {
  const page = await world.open();
  await page.locator(".teacher .steps").fill("12");
  await page.locator(".student .steps").fill("3");
  await page.locator(".student .sampler").selectOption("heun");
  await page.click("#run");
  await done(page);
  assert.match(await text(page, ".teacher .note"), /^12 evaluations/);
  assert.match(await text(page, ".student .note"), /^5 evaluations/, "Heun takes two per step but the last");
}

export async function the_same_seed_gives_the_same_images_and_another_seed_others(world) {
  const page = await world.open();
  await page.locator(".teacher .steps").fill("8");
  const seen = [];
  for (const button of ["#run", "#run", "#reseed"]) {
    await page.click(button);
    await done(page);
    seen.push(JSON.stringify([await sources(page, "teacher"), await sources(page, "student")]));
  }
  assert.equal(seen[0], seen[1]);
  assert.notEqual(seen[0], seen[2]);
}

export async function the_swipe_uncovers_one_image_above_the_other(world) {
  const page = await world.open();
  await page.click("#run");
  await done(page);
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
  await page.keyboard.press("Enter");
  await done(page);
  assert.match(await images(page, "student").getAttribute("alt"), /^Bag, seed 21,/);
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
  assert.equal(await page.locator("[role=alert], [role=status]").count(), 2, "live regions");
  assert.equal(await page.locator("html[lang]").count(), 1);
}

/** WCAG 2.2, 1.4.3: 4.5 to 1, and 3 to 1 for large text. */
export async function text_stands_out_in_light_and_in_dark(world) {
  const least = {};
  for (const colorScheme of ["light", "dark"]) {
    const page = await world.open({ colorScheme, reducedMotion: "reduce" });
    await page.click("#run");
    await done(page);
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

export async function a_phone_scrolls_only_downwards(world) {
  for (const colorScheme of ["light", "dark"]) {
    const page = await world.open({ width: 360, height: 740, deviceScaleFactor: 2, colorScheme, hasTouch: true });
    const fits = async (what) => {
      const width = await page.evaluate(() => document.documentElement.scrollWidth);
      assert(width <= 360, `${what}: ${width} pixels wide`);
    };
    await fits("idle");
    await page.selectOption("#count", "9");
    await page.locator("#run").tap();
    await done(page);
    await fits("done");
    await world.shot(page, `phone-${colorScheme}`);
    await page.getByRole("radio", { name: "Overlay" }).tap();
    await fits("overlay");
    const targets = page.locator("button:visible, select:visible, input:visible, summary, nav a");
    for (const target of await targets.all()) {
      const { height } = await target.boundingBox();
      assert(height >= 24, `${await target.evaluate((element) => element.outerHTML)} is ${height} high`);
    }
    await page.locator("summary").tap();
    await fits("key");
    await world.shot(page, `phone-overlay-${colorScheme}`);
  }
}

export async function the_strip_follows_the_servers_metrics(world) {
  const page = await world.open();
  await page.locator(".live.on").waitFor();
  await page.locator("#latency tr").nth(1).waitFor();
  const count = async (row) => Number(await page.locator("#latency tr").nth(row).locator("td").last().textContent());
  const before = await count(0);
  await api(world.base, "/v1/images/generations", { model: TEACHER, seed: 1, num_inference_steps: 6, n: 4 });
  await until(async () => (await count(0)) === before + 1, "the request is counted");
  assert.equal(await count(1), 0, "the student had none");
  const cells = await page.locator("#latency tr").first().locator("td").allTextContents();
  assert(cells.slice(0, 3).every((cell) => /^[\d.]+ m?s$/.test(cell)), cells.join());
  assert.match(await text(page, "#batch"), /^[1-4]\.\d$/);
  const running = until(async () => Number(await text(page, "#running")) + Number(await text(page, "#waiting")) > 0, "something runs");
  await page.locator(".teacher .steps").fill("900");
  await page.selectOption("#count", "4");
  await page.click("#run");
  await running;
  await page.click("#run");
  return `p50, p95, p99: ${cells.slice(0, 3).join(", ")}`;
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
  await page.click("#run");
  await done(page);
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
  await page.locator(".teacher .steps").fill("10");
  await page.click("#run");
  await done(page);
  assert.equal(await text(page, "#problem"), "");
  await page.locator(".live.on").waitFor();
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
  await page.click("#run");
  await done(page);
  await page.locator(".live.on").waitFor();
  const kept = await page.evaluate(async () => [{ ...localStorage }, { ...sessionStorage }, document.cookie, (await indexedDB.databases()).length, location.href]);
  assert.deepEqual(kept, [{}, {}, "", 0, `${server.base}/`]);
  await page.reload();
  await said(page, /API key/);
}

export async function a_model_without_a_student_draws_alone(world) {
  const server = await world.start("lone");
  const page = await world.open({ base: server.base });
  assert.match(await text(page, "#lede"), /^Only clothes-teacher is served/);
  assert.equal(await text(page, "h1"), "Nothing to compare yet.");
  assert(!(await page.locator(".student .board").isVisible()));
  await page.selectOption("#count", "4");
  await page.getByRole("button", { name: "Draw" }).click();
  await page.locator(".teacher.done").waitFor({ state: "attached" });
  const { data } = await api(server.base, "/v1/images/generations", { seed: 7, n: 4 });
  assert.deepEqual(await sources(page, "teacher"), data.map(({ b64_json }) => `data:image/png;base64,${b64_json}`));
  assert.match(await text(page, "#facts"), /Evaluations each50/);
  await world.shot(page, "desktop-alone");
}
