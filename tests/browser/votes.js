// What must be true of the blind vote.

import assert from "node:assert/strict";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";

import { STUDENT, TEACHER } from "./server.js";

const GONE = /Failed to load resource: net::ERR_/;
const MODELS = [TEACHER, STUDENT];

const text = (page, selector) => page.locator(selector).textContent();
const shown = (page) => page.locator(".pick:enabled img").nth(1).waitFor();
const told = (page, pattern = /^You /) => page.locator("#question").filter({ hasText: pattern }).waitFor();
const focused = (page) => page.evaluate(() => document.activeElement.id);

async function experiments(base) {
  return (await (await fetch(`${base}/v1/experiments`)).json()).data;
}

const votes = ([{ comparisons }]) => comparisons[0].wins + comparisons[0].losses + comparisons[0].ties;

export async function one_click_begins_a_vote_that_tells_nothing_before_it_is_cast(world) {
  const { base } = await world.start("pair");
  const page = await world.open({ base });
  const sent = [];
  page.on("response", (response) => sent.push(response));
  await page.getByRole("link", { name: "Blind vote" }).click();
  await page.getByRole("button", { name: "Start voting" }).waitFor();
  assert.equal(await text(page, "h1"), "Which is better?");
  assert.equal(await text(page, "#create-note"), `Between ${TEACHER} and ${STUDENT}.`);
  await world.shot(page, "vote-idle");
  await page.click("#create");
  await shown(page);
  assert.match(await text(page, "#question"), /^Which is the better “.+”\?$/);
  const pair = sent.find((response) => response.url().endsWith("/pairs"));
  const seen = JSON.stringify([await pair.json(), await pair.allHeaders(), await text(page, "#ballot")]);
  for (const word of [...MODELS, "seed", "device", "queue"]) assert(!seen.includes(word), word);
  assert(!(await page.locator("#standing").isVisible()));
  await world.shot(page, "vote-pair");
  assert.match(await text(page, "#arms"), new RegExp(`^Experiment .+: ${TEACHER} against ${STUDENT}\\.$`));

  // What an image looks like is not changed by what becomes of it.
  const looks = () => page.locator(".frame").evaluateAll((frames) => frames.map((frame) => {
    const { x, y, width, height } = frame.getBoundingClientRect();
    const chain = [];
    for (let at = frame.firstElementChild; at; at = at.parentElement) {
      const { opacity, filter, mixBlendMode, transform } = getComputedStyle(at);
      chain.push([opacity, filter, mixBlendMode, transform].join());
    }
    return { x, y, width, height, chain: chain.join(" "), square: Math.abs(width - height) < 0.5 };
  }));
  const pixels = async () => Promise.all([0, 1].map(async (side) => (await page.locator(".frame img").nth(side).screenshot()).toString("base64")));
  const before = [await looks(), await pixels()];
  await page.locator(".pick").nth(1).click();
  await told(page);
  await page.mouse.move(0, 0);
  assert.deepEqual([await looks(), await pixels()], before, "neither image changes at the reveal");
  assert(before[0].every(({ square }) => square));
  const captions = await page.locator(".caption").allTextContents();
  assert.deepEqual([...captions].sort(), [...MODELS].sort(), "both are revealed");
  assert.equal(await text(page, "#question"), `You preferred ${captions[1]}.`);
  assert.equal(await text(page, "#status"), `You preferred ${captions[1]}. Left was ${captions[0]}, right was ${captions[1]}.`);
  await page.locator("#standing").waitFor();
  const [{ id, arms }] = await experiments(base);
  assert.equal(arms.find(({ model }) => model === captions[1]).wins, 1);
  assert.equal(await text(page, "#finding"), "No preference is proven after 1 vote (p = 1.000).");
  await world.shot(page, "vote-revealed");
  return `${id}: ${captions[1]} over ${captions[0]}`;
}

export async function the_keyboard_votes_where_the_ballot_has_the_focus(world) {
  const { base } = await world.start("pair");
  const page = await world.open({ base, path: "/#vote" });
  await page.locator("#create").focus();
  await page.keyboard.press("Enter");
  const expected = { wins: 0, ties: 0 };
  for (const [key, side] of [["1", 0], ["ArrowRight", 1], ["0", "tie"], ["ArrowLeft", 0], ["2", 1], ["ArrowDown", "tie"]]) {
    await shown(page);
    assert.equal(await focused(page), "ballot");
    await page.keyboard.press(key);
    await told(page);
    const captions = await page.locator(".caption").allTextContents();
    assert.equal(await text(page, "#question"), side === "tie" ? "You saw no difference." : `You preferred ${captions[side]}.`);
    expected.wins += captions[side] === STUDENT;
    expected.ties += side === "tie";
    assert.equal(await focused(page), "go-on");
    await page.keyboard.press(key);
    await page.keyboard.press("Enter");
  }
  await shown(page);
  const student = (await experiments(base))[0].arms.find(({ model }) => model === STUDENT);
  assert.deepEqual({ wins: student.wins, ties: student.ties }, expected);
  // A key that is meant for something else is no vote.
  await page.locator(".mark").focus();
  await page.keyboard.press("1");
  await page.keyboard.press("0");
  assert.equal(votes(await experiments(base)), 6);
  const rows = await page.locator("#standings tr").allTextContents();
  assert(rows.some((row) => row.startsWith(`${STUDENT}${student.wins}2`)), rows.join());
  await world.shot(page, "vote-standing");
  return rows.join("; ");
}

export async function a_vote_is_sent_again_when_the_server_is_back_and_counts_once(world) {
  world.expected = GONE;
  const kept = fs.mkdtempSync(path.join(os.tmpdir(), "understudy-kept-"));
  const flags = [`--data-dir=${kept}`];
  const server = await world.start("pair", ...flags);
  const page = await world.open({ base: server.base, path: "/#vote" });
  await page.click("#create");
  await shown(page);
  await server.kill();
  await page.keyboard.press("1");
  await page.locator("#problem").filter({ hasText: "cannot be reached" }).waitFor();
  assert.equal(await text(page, "#go-on"), "Send again");
  assert.equal(await page.locator(".caption").first().textContent(), "Left 1", "nothing is revealed");
  await world.shot(page, "vote-broken");
  await world.start("pair", `--port=${new URL(server.base).port}`, ...flags);
  await page.click("#go-on");
  await told(page);
  assert.equal(await text(page, "#problem"), "");
  assert.equal(votes(await experiments(server.base)), 1);
  fs.rmSync(kept, { recursive: true });
}

export async function an_experiment_that_is_gone_is_told_and_left(world) {
  world.expected = /Failed to load resource: the server responded with a status of 404/;
  const { base } = await world.start("pair");
  const page = await world.open({ base, path: "/#vote" });
  await page.click("#create");
  await shown(page);
  const [{ id }] = await experiments(base);
  await fetch(`${base}/v1/experiments/${id}`, { method: "DELETE" });
  await page.keyboard.press("2");
  await page.locator("#problem").filter({ hasText: "There is no experiment" }).waitFor();
  await page.click("#go-on");
  await page.getByRole("button", { name: "Start voting" }).waitFor();
  assert(!(await page.locator("#ballot").isVisible()));
  await page.click("#create");
  await shown(page);
}

export async function the_vote_is_readable_named_and_fits_a_phone(world) {
  const { base } = await world.start("pair");
  for (const colorScheme of ["light", "dark"]) {
    const page = await world.open({ base, path: "/#vote", width: 360, height: 740, deviceScaleFactor: 2, colorScheme, hasTouch: true, reducedMotion: "reduce" });
    await page.locator("#create:visible, .pick:enabled img").first().waitFor();
    if (await page.locator("#create").isVisible()) await page.locator("#create").tap();
    await shown(page);
    await world.shot(page, `vote-phone-${colorScheme}`);
    await page.locator(".pick").first().tap();
    await told(page);
    await page.locator("#standing").waitFor();
    const width = await page.evaluate(() => document.documentElement.scrollWidth);
    assert(width <= 360, `${width} pixels wide`);
    const faint = (await world.contrasts(page)).filter(({ ratio, large }) => ratio < (large ? 3 : 4.5));
    assert.deepEqual(faint, []);
    const tree = await page.locator("main").ariaSnapshot();
    const nameless = [...tree.matchAll(/^\s*- (button|combobox|group|link|table)\b(.*)$/gm)].filter(([, , rest]) => !rest.includes('"'));
    assert.deepEqual(nameless.map(([line]) => line.trim()), [], tree);
    assert.equal(await page.locator("[role=alert]:visible, [role=status]").count() > 0, true, "live regions");
    for (const target of await page.locator("main button:visible, main select:visible").all()) {
      const { height } = await target.boundingBox();
      assert(height >= 44, `${await target.evaluate((element) => element.outerHTML)} is ${height} high`);
    }
    await world.shot(page, `vote-phone-revealed-${colorScheme}`);
  }
}

export async function an_arm_that_a_guardrail_stopped_is_told_with_the_reason(world) {
  const { base } = await world.start("pair");
  const post = async (path, body) => {
    const headers = { "content-type": "application/json" };
    const reply = await fetch(`${base}/v1/${path}`, { method: "POST", headers, body: JSON.stringify(body) });
    assert(reply.ok, await reply.clone().text());
  };
  const arms = [{ model: TEACHER }, { model: STUDENT }];
  await post("experiments", { id: "guarded", arms, guardrails: { max_latency_ratio: 0.001, min_requests: 1 }, ramp: { shares: [0.25, 1] } });
  const page = await world.open({ base, path: "/#vote" });
  await shown(page);
  const told = () => text(page, "#arms");
  assert.match(await told(), new RegExp(`${STUDENT} has 25 % of the traffic, stage 1 of 2\\.$`));
  for (let user = 0; !(await experiments(base))[0].arms[1].stopped; user += 1) {
    assert(user < 100, "both arms serve sooner or later");
    await post("images/generations", { model: "experiment:guarded", user: `${user}`, num_inference_steps: 1 });
  }
  await page.reload();
  await shown(page);
  assert.match(await told(), new RegExp(`${STUDENT} was stopped: its median time is .* times the control's.* max_latency_ratio 0.001\\.$`));
  await world.shot(page, "vote-stopped");
}

export async function without_a_student_there_is_nothing_to_vote_on(world) {
  const { base } = await world.start("lone");
  const page = await world.open({ base, path: "/#vote" });
  await page.locator("#create-note").filter({ hasText: /^It takes two models/ }).waitFor();
  assert(!(await page.locator("#create").isVisible()));
  assert(!(await page.locator("#ballot").isVisible()));
}
