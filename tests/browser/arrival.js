// What must be true before there is something to compare: models on their way, models that are missing.

import assert from "node:assert/strict";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";

import { STUDENT, TEACHER, hub } from "./server.js";

const STAGES = ["waiting", "downloading", "reading", "measuring", "ready"];

const text = (page, selector) => page.locator(selector).textContent();
const sources = (page) => page.locator(".teacher .board img").evaluateAll((all) => all.map(({ src }) => src));

/** Notes each change of a model's stage in the page. */
const watch = (page) =>
  page.addInitScript(() => {
    window.stages = [];
    addEventListener("DOMContentLoaded", () => {
      const note = () => {
        for (const row of document.querySelectorAll("#loads li")) {
          const line = [row.dataset.model, row.dataset.stage, row.querySelector("progress").value, row.querySelector("span").textContent];
          if (window.stages.findLast(([model]) => model === line[0])?.join() !== line.join()) window.stages.push(line);
        }
      };
      new MutationObserver(note).observe(document.getElementById("loads"), { childList: true, subtree: true, attributes: true, characterData: true });
    });
  });

/** A Hub that gives nothing yet holds the server where its models are on their way, for as long as a check needs. */
export async function a_page_opened_before_the_models_are_ready_says_how_far_and_goes_on(world) {
  const far = await hub("acme/slow");
  const home = fs.mkdtempSync(path.join(os.tmpdir(), "understudy-hub-"));
  const environment = { HF_ENDPOINT: far.endpoint, HF_HOME: home, HF_HUB_CACHE: "", HF_TOKEN: "" };
  const server = await world.launch("pair", environment, "--default-model=acme/slow");
  const page = await world.open({ base: server.base, ready: false, prepare: watch });
  await page.locator("#loads [data-stage=downloading]").waitFor();
  assert.equal(await text(page, "#title"), "Getting the models ready");
  assert.match(await text(page, "#lede"), /^\d of 3 ready\. The page goes on by itself\.$/);
  assert.match(await text(page, "[data-model=acme--slow] span"), /^Downloading from the Hub, [\d.]+ s$/);
  assert(!(await page.locator("#controls, .stage, .live").first().isVisible()));
  for (const colorScheme of ["light", "dark"]) {
    await page.emulateMedia({ colorScheme });
    assert.deepEqual(await world.faults(page), []);
    await world.shot(page, `warm-up-${colorScheme}`);
  }
  far.release();
  await page.locator("#fields:enabled").waitFor({ state: "attached", timeout: 60_000 });
  await page.locator("#history td").first().waitFor({ state: "attached" });
  assert.equal(await text(page, "#problem"), "");
  const stages = await page.evaluate(() => window.stages);
  assert(stages.some(([, stage]) => stage === "measuring"), JSON.stringify(stages));
  for (const model of new Set(stages.map(([model]) => model))) {
    const own = stages.filter(([name]) => name === model);
    // A model of the Hub may wait for its turn once it is downloaded.
    const order = own.map(([, stage]) => STAGES.indexOf(stage)).filter((stage) => stage > 1);
    assert.deepEqual(order, [...order].sort(), `${model}: ${own.map(([, stage]) => stage)}`);
    const shares = own.filter(([, stage]) => stage === "measuring").map(([, , share]) => share);
    assert(shares.every((share, at) => share >= 0 && share <= 1 && share >= (shares[at - 1] ?? 0)), `${model}: ${shares}`);
  }
  const measured = stages.find(([, stage, share]) => stage === "measuring" && share > 0);
  assert.match(measured[3], /^Measuring its speed, [\d.]+ s of at most 4 s$/);
  far.close();
  fs.rmSync(home, { recursive: true });
  return measured.join(", ");
}

export async function a_page_opened_before_the_server_goes_on_when_it_is_there(world) {
  world.expected = /net::ERR_CONNECTION|Failed to load resource/;
  const first = await world.start("pair");
  const page = await world.open({ base: first.base, path: "/?steps=4,2" });
  // The page is there, and its server is not.
  await first.kill();
  await page.locator(".live:not(.on)").waitFor();
  await page.getByRole("button", { name: "Compare" }).click();
  await page.locator("#problem").filter({ hasText: "cannot be reached" }).waitFor();
  await world.start("pair", `--port=${new URL(first.base).port}`);
  await page.locator(".live.on").waitFor();
  await page.locator("#fields:enabled").waitFor();
  await page.getByRole("button", { name: "Compare" }).click();
  await page.locator("#history td:first-child").nth(1).waitFor({ state: "attached" });
  assert.equal(await text(page, "#problem"), "");
}

export async function a_page_without_a_model_says_why_and_goes_on_when_there_is_one(world) {
  const { base } = await world.start("lone");
  const order = (what) => fetch(`${base}/v2/repository/models/${TEACHER}/${what}`, { method: "POST" });
  await order("unload");
  const page = await world.open({ base, ready: false });
  await page.locator("#problem").filter({ hasText: `No model is ready. ${TEACHER}: it is not loaded` }).waitFor();
  await order("load");
  await page.locator(".teacher.done").waitFor({ state: "attached" });
  assert.equal(await text(page, "#problem"), "");
}

export async function a_model_without_a_student_draws_alone(world) {
  const server = await world.start("lone");
  const page = await world.open({ base: server.base });
  assert.equal(await text(page, "h1"), TEACHER);
  const notice = await text(page, "#notice");
  assert(notice.startsWith(`${TEACHER} has no student on this server`), notice);
  assert(notice.endsWith("understudy serve --models DIR_OF_TEACHER --models DIR_OF_STUDENT"), notice);
  assert(!(await page.locator(".student .board").isVisible()));
  assert(!(await page.locator("#speedup").isVisible()));
  assert.equal((await sources(page)).length, 4, "the first visit draws");
  await page.fill("#seed", "9");
  await page.getByRole("button", { name: "Draw" }).click();
  await page.locator(".teacher.done").waitFor({ state: "attached" });
  const request = { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify({ seed: 9, n: 4 }) };
  const { data } = await (await fetch(`${server.base}/v1/images/generations`, request)).json();
  assert.deepEqual(await sources(page), data.map(({ b64_json }) => `data:image/png;base64,${b64_json}`));
  assert.match(await text(page, "#facts"), /Evaluations each50/);
  assert.deepEqual(await world.faults(page), []);
  await world.shot(page, "desktop-lone-teacher");
}

export async function a_student_without_its_teacher_says_what_is_missing(world) {
  const server = await world.start("orphan");
  const page = await world.open({ base: server.base });
  const notice = await text(page, "#notice");
  assert(notice.startsWith(`${STUDENT} is the student of ${TEACHER}, which this server does not have.`), notice);
  assert(notice.endsWith("understudy serve --models DIR_OF_TEACHER --models DIR_OF_STUDENT"), notice);
  assert.deepEqual(await world.faults(page), []);
  await world.shot(page, "desktop-missing-teacher");
  // The remedy works while the page is open: it goes on by itself.
  world.expected = /net::ERR_|Failed to load resource/;
  await server.kill();
  await page.locator(".live:not(.on)").waitFor();
  await world.start("pair", `--port=${new URL(server.base).port}`);
  await page.locator("#history td").first().waitFor({ state: "attached" });
  assert.equal(await text(page, "#title"), `${TEACHER} and its student ${STUDENT}`);
  assert.equal(await text(page, "#notice"), "");
  const unloaded = await world.start("pair");
  await fetch(`${unloaded.base}/v2/repository/models/${TEACHER}/unload`, { method: "POST" });
  const other = await world.open({ base: unloaded.base });
  assert.match(await text(other, "#notice"), new RegExp(`^${STUDENT} is the student of ${TEACHER}, which is not ready: it is not loaded`));
  return notice;
}
