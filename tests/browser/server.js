// A real server on a free port, with a pair of models or with the bundled one alone.

import { spawn } from "node:child_process";
import fs from "node:fs";
import http from "node:http";
import net from "node:net";
import os from "node:os";
import path from "node:path";
import { fileURLToPath } from "node:url";

export const ROOT = fileURLToPath(new URL("../..", import.meta.url));
const ZOO = path.join(ROOT, "models/zoo");
const BUNDLED = path.join(ZOO, "fashion-mnist-teacher");
/** What was measured of the bundled student, and a likeness to the teacher. */
const SCORES = { ...JSON.parse(fs.readFileSync(path.join(ZOO, "fashion-mnist-student/understudy.json"))).scores, psnr_db: 26.1 };

export const TEACHER = "clothes-teacher";
export const STUDENT = "clothes-student";

/** Steps of the two by their model cards. */
export const STEPS = { [TEACHER]: 50, [STUDENT]: 10 };

/** A folder with a teacher and, in the place of a student, the same network with a card that asks for
    a fifth of the steps. */
export function pairFolder() {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "understudy-pair-"));
  // Nobody has scored it.
  write(folder, TEACHER, { role: "teacher", scores: undefined });
  write(folder, STUDENT, { role: "student", teacher: TEACHER, scores: SCORES });
  return folder;
}

/** A folder with a student whose teacher is elsewhere. */
export function orphanFolder() {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "understudy-orphan-"));
  write(folder, STUDENT, { role: "student", teacher: TEACHER, scores: SCORES });
  return folder;
}

/** A pair, and a model that nobody asked for, with a long name. */
export const THIRD = "clothes-baseline-of-30-letters";
export function trioFolder() {
  const folder = pairFolder();
  write(folder, THIRD, { role: "baseline" });
  return folder;
}

export function loneFolder() {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "understudy-lone-"));
  // Nobody has scored it.
  write(folder, TEACHER, { role: "teacher", scores: undefined });
  return folder;
}

export const ARTIST = "emoji-teacher";
/** A text-to-image model, and in the place of a student the same with fewer steps. */
export function textFolder() {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "understudy-text-"));
  const emoji = path.join(ZOO, "emoji-text-to-image");
  write(folder, ARTIST, { role: "teacher" }, emoji);
  write(folder, "emoji-student", { role: "student", teacher: ARTIST }, emoji);
  return folder;
}

function write(folder, id, card, from = BUNDLED) {
  const model = path.join(folder, id);
  fs.cpSync(from, model, { recursive: true });
  const file = path.join(model, "understudy.json");
  const there = JSON.parse(fs.readFileSync(file));
  const defaults = { ...there.defaults, num_inference_steps: STEPS[id] ?? 4, scheduler: "ddim" };
  fs.writeFileSync(file, JSON.stringify({ ...there, ...card, defaults }));
}

/** Starts the program and waits until it serves; `stop` and `kill` end it. */
export async function start(program, models, ...flags) {
  const server = await launch(program, models, {}, ...flags);
  const end = performance.now() + 60_000;
  while ((await fetch(`${server.base}/health`)).status === 503) {
    if (performance.now() > end) throw new Error(`${server.base}/health does not become 200`);
    await new Promise((wake) => setTimeout(wake, 50));
  }
  return server;
}

/** Starts the program and waits until it answers at all; its models are on their way. `environment` is added to ours. */
export async function launch(program, models, environment, ...flags) {
  const log = path.join(os.tmpdir(), `understudy-browser-${process.pid}.log`);
  const named = flags.find((flag) => flag.startsWith("--port="));
  const port = named?.slice("--port=".length) ?? (await freePort());
  // What is kept goes with the folder of models, unless a check keeps it elsewhere.
  const kept = flags.some((flag) => flag.startsWith("--data-dir=")) ? [] : [`--data-dir=${fs.mkdtempSync(path.join(models, "kept-"))}`];
  const argv = ["serve", `--models=${models}`, "--threads=2", ...kept, ...flags, ...(named ? [] : [`--port=${port}`])];
  const child = spawn(program, argv, { stdio: ["ignore", "ignore", fs.openSync(log, "a")], env: { ...process.env, ...environment } });
  let code;
  const ended = new Promise((resolve) => child.on("exit", (status, signal) => resolve((code = status ?? signal))));
  const end = (signal) => {
    child.kill(signal);
    return ended;
  };
  const base = `http://127.0.0.1:${port}`;
  while (!(await fetch(`${base}/health`).catch(() => undefined))) {
    if (code !== undefined) throw new Error(`${program} ended early with ${code}; see ${log}`);
    await new Promise((wake) => setTimeout(wake, 20));
  }
  return { base, stop: () => end("SIGTERM"), kill: () => end("SIGKILL") };
}

/** A port that nothing listens on. */
async function freePort() {
  const server = net.createServer().listen(0, "127.0.0.1");
  await new Promise((listening) => server.on("listening", listening));
  const { port } = server.address();
  await new Promise((closed) => server.close(closed));
  return port;
}

/** A Hub with the bundled student as `id`, which gives nothing until it is released. */
export async function hub(id) {
  const sha = "0123456789abcdef0123456789abcdef01234567";
  const folder = path.join(ZOO, "fashion-mnist-student");
  const names = fs.readdirSync(folder, { recursive: true }).filter((name) => fs.statSync(path.join(folder, name)).isFile());
  const siblings = names.map((rfilename) => ({ rfilename, size: fs.statSync(path.join(folder, rfilename)).size }));
  let release;
  const released = new Promise((resolve) => (release = resolve));
  const server = http.createServer(async ({ url, headers }, reply) => {
    await released;
    const [asked] = url.split("?");
    const name = asked.replace(`/${id}/resolve/${sha}/`, "");
    if (asked === `/api/models/${id}/revision/main`) return reply.end(JSON.stringify({ sha, siblings }));
    if (!names.includes(name)) return reply.writeHead(404).end();
    const bytes = fs.readFileSync(path.join(folder, name));
    const [, from, to] = /bytes=(\d+)-(\d*)/.exec(headers.range ?? "bytes=0-");
    const end = to ? Number(to) + 1 : bytes.length;
    const part = bytes.subarray(Number(from), end);
    reply.writeHead(206, { etag: `"${name.replaceAll(/\W/g, "")}"`, "x-repo-commit": sha, "content-range": `bytes ${from}-${end - 1}/${bytes.length}`, "content-length": part.length });
    reply.end(part);
  });
  server.listen(0, "127.0.0.1");
  await new Promise((listening) => server.on("listening", listening));
  return { endpoint: `http://127.0.0.1:${server.address().port}`, release, close: () => server.close() };
}

/** The newest of the programs that cargo has built. */
export function newestBinary() {
  const built = ["debug", "release"].map((profile) => path.join(ROOT, "target", profile, "understudy"));
  const [newest] = built.filter(fs.existsSync).sort((a, b) => fs.statSync(b).mtimeMs - fs.statSync(a).mtimeMs);
  if (!newest) throw new Error("no target/*/understudy: run `cargo build` first, or name a binary");
  return newest;
}
