// The page in a real browser against a real server.
//
//     npm ci && node run.js [BINARY] [--shots DIR] [--only WORD]
//
// Without BINARY, the newest of target/*/understudy. CHROMIUM names another browser than Debian's.
// With --shots, screenshots go to DIR, to be looked at. Exits with 0 only if every check passes.

import fs from "node:fs";
import path from "node:path";
import { parseArgs } from "node:util";
import { chromium } from "playwright-core";

import * as arriving from "./arrival.js";
import * as comparing from "./checks.js";
import * as looking from "./looks.js";
import { loneFolder, newestBinary, orphanFolder, pairFolder, start, textFolder, trioFolder } from "./server.js";
import * as voting from "./votes.js";
import { World } from "./world.js";

const options = { shots: { type: "string" }, only: { type: "string", default: "" } };
const { values, positionals } = parseArgs({ options, allowPositionals: true });
const program = path.resolve(positionals[0] ?? newestBinary());
const { shots, only } = values;
if (shots) fs.mkdirSync(shots, { recursive: true });

const flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
  "--disable-background-networking", "--disable-component-update"];
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: flags });
const folders = { pair: pairFolder(), lone: loneFolder(), orphan: orphanFolder(), trio: trioFolder(), text: textFolder() };
const server = await start(program, folders.pair);
let passed = 0;
let failed = 0;

const checks = Object.entries({ ...arriving, ...comparing, ...voting, ...looking });
for (const [name, check] of checks.filter(([name]) => name.includes(only))) {
  const began = performance.now();
  const world = new World({ browser, program, folders, shots, base: server.base });
  try {
    const said = await check(world);
    world.quiet();
    passed += 1;
    report("ok", name, said ?? "", began);
  } catch (error) {
    failed += 1;
    report("FAILED", name, error.stack, began);
  } finally {
    await world.close();
  }
}
await browser.close();
const code = await server.stop();
if (code !== 0) {
  failed += 1;
  console.log(`FAILED the server ended with ${code}`);
}
for (const folder of Object.values(folders)) fs.rmSync(folder, { recursive: true });
console.log(`${passed} passed, ${failed} failed`);
process.exitCode = failed ? 1 : 0;

function report(verdict, name, said, began) {
  const seconds = ((performance.now() - began) / 1000).toFixed(1);
  console.log(`${verdict.padEnd(6)} ${seconds.padStart(5)} s  ${name.replaceAll("_", " ")}${said && `: ${said}`}`);
}
