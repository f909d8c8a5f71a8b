// The page and the report as a new user meets them, for tests/first_hour/run.sh, which says what is where.
//
//     node first_hour.js bundled PROGRAM SHOTS     a page opened while the bundled pair loads; every view, a vote, an error
//     node first_hour.js student PROGRAM SHOTS     the student in my-models beside its bundled teacher
//     node first_hour.js report FILE SHOTS         the report, from the disk
//
// Screenshots go to the folder SHOTS. Exits with 0 only if everything is as it must be, and axe-core finds nothing.

import assert from "node:assert/strict";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { pathToFileURL } from "node:url";
import { chromium } from "playwright-core";

import { ROOT, launch } from "./server.js";
import { World } from "./world.js";

const PHONE = { width: 360, height: 640, deviceScaleFactor: 2, hasTouch: true, isMobile: true };
const THEMES = ["light", "dark"];
const REFUSED = /Failed to load resource: the server responded with a status of 4\d\d/;

const [mode, subject, shots] = process.argv.slice(2);
const modes = { bundled, student, report };
if (!modes[mode] || !shots) throw new Error("first_hour.js bundled|student PROGRAM SHOTS, or report FILE SHOTS");
fs.mkdirSync(shots, { recursive: true });
const flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
  "--disable-background-networking", "--disable-component-update"];
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: flags });
const scratch = fs.mkdtempSync(path.join(os.tmpdir(), "understudy-hour-"));
const kept = `--data-dir=${path.join(scratch, "data")}`;
const world = new World({ browser, program: subject, folders: { bundled: path.join(ROOT, "models/zoo"), mine: path.resolve("my-models") }, shots });
try {
  await modes[mode]();
  world.quiet();
} finally {
  await world.close();
  await browser.close();
  fs.rmSync(scratch, { recursive: true });
}

/** A comparison is there, with its speed-up. */
async function compared(page) {
  await page.locator("#history td").first().waitFor({ state: "attached", timeout: 60_000 });
  await page.locator("#latency tr").nth(1).waitFor();
}

/** axe-core finds nothing, and the view is kept. */
async function look(page, name) {
  assert.deepEqual(await world.faults(page), [], name);
  await world.shot(page, name);
}

/** The server ends well, after the pages that ask it. */
async function end(server) {
  for (const context of world.contexts.splice(0)) await context.close();
  assert.equal(await server.stop(), 0, "the server's end");
}

async function bundled() {
  // Nothing is kept from an earlier start, so the models take as long as at the first.
  const server = await world.launch("bundled", { XDG_CACHE_HOME: scratch }, kept, "--max-images-per-request=4");
  const { base } = server;
  const page = await world.open({ base, ready: false });
  await page.locator("#loads li").first().waitFor();
  await look(page, "warm-up");
  await page.locator("#fields:enabled").waitFor({ state: "attached", timeout: 60_000 });
  await compared(page);
  assert.equal(await page.locator("#problem").textContent(), "");
  console.log(`opened while models were on their way; speed-up ${(await page.locator("#speedup").textContent()).trim()}`);
  await page.getByRole("button", { name: "5 more runs" }).click();
  await page.locator("#history tbody tr td:first-child").filter({ hasText: /^6$/ }).waitFor({ timeout: 120_000 });
  await page.locator("#run").filter({ hasText: "Compare" }).waitFor();
  for (const colorScheme of THEMES) {
    await page.emulateMedia({ colorScheme });
    await look(page, `desktop-${colorScheme}`);
    const first = { x: 0, y: 0, width: 1280, height: 900 };
    await page.screenshot({ path: path.join(shots, `above-the-fold-${colorScheme}.png`), clip: first });
  }
  world.expected = REFUSED;
  await page.selectOption("#count", "16");
  await page.click("#run");
  await page.locator("#problem").filter({ hasText: "16" }).waitFor();
  await look(page, "error");

  for (const colorScheme of THEMES) {
    const phone = await world.open({ base, colorScheme, ...PHONE });
    await compared(phone);
    await look(phone, `phone-${colorScheme}`);
    const vote = await world.open({ base, path: "/#vote", colorScheme, ...(colorScheme === "dark" ? PHONE : {}) });
    await vote.locator("#create:visible, .pick:enabled img").first().waitFor();
    if (await vote.locator("#create").isVisible()) await vote.click("#create");
    await vote.locator(".pick:enabled img").nth(1).waitFor();
    await look(vote, `vote-${colorScheme}`);
    await vote.locator(".pick").first().click();
    await vote.locator("#question").filter({ hasText: /^You / }).waitFor();
    await vote.locator("#standing").waitFor();
    await look(vote, `vote-cast-${colorScheme}`);
  }
  await end(server);
}

async function student() {
  const server = await world.launch("mine", {}, kept);
  const page = await world.open({ base: server.base, ready: false });
  await page.locator("#fields:enabled").waitFor({ state: "attached", timeout: 60_000 });
  await compared(page);
  const title = await page.locator("h1").innerText();
  assert.match(title, /fashion-mnist-teacher[^]*student/, "who is compared with whom");
  await look(page, "own-student");
  console.log(`${title.replaceAll(/\s+/g, " ")}: speed-up ${(await page.locator("#speedup").textContent()).trim()}`);
  await end(server);
}

async function report() {
  for (const colorScheme of THEMES) {
    const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, colorScheme });
    const page = await context.newPage();
    page.on("request", (request) => {
      if (!/^(file|data):/.test(request.url())) world.outside.push(request.url());
    });
    await page.goto(pathToFileURL(path.resolve(subject)).href);
    for (const image of await page.locator("img").all()) {
      assert(await image.evaluate((it) => it.complete && it.naturalWidth > 0), "an image of the report");
    }
    await look(page, `report-${colorScheme}`);
    await context.close();
  }
  console.log("the report loads nothing, and all of its images are there");
}
