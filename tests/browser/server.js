// A real server on a free port, with a pair of models or with the bundled one alone.

import { spawn } from "node:child_process";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { fileURLToPath } from "node:url";

export const ROOT = fileURLToPath(new URL("../..", import.meta.url));
const BUNDLED = path.join(ROOT, "models/zoo/fashion-mnist-teacher");

export const TEACHER = "clothes-teacher";
export const STUDENT = "clothes-student";

/** Steps of the two by their model cards. */
export const STEPS = { [TEACHER]: 50, [STUDENT]: 10 };

/** A folder with a teacher and, in the place of a student, the same network with a card that asks for
    a fifth of the steps. */
export function pairFolder() {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "understudy-pair-"));
  write(folder, TEACHER, { role: "teacher" });
  write(folder, STUDENT, { role: "student", teacher: TEACHER });
  return folder;
}

export function loneFolder() {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), "understudy-lone-"));
  write(folder, TEACHER, { role: "teacher" });
  return folder;
}

function write(folder, id, card) {
  const model = path.join(folder, id);
  fs.cpSync(BUNDLED, model, { recursive: true });
  const file = path.join(model, "understudy.json");
  const defaults = { num_inference_steps: STEPS[id], scheduler: "ddim" };
  fs.writeFileSync(file, JSON.stringify({ ...JSON.parse(fs.readFileSync(file)), ...card, defaults }));
}

/** Starts the program and waits until it serves; `stop` and `kill` end it. */
export async function start(program, models, ...flags) {
  const log = path.join(os.tmpdir(), `understudy-browser-${process.pid}.log`);
  const port = flags.some((flag) => flag.startsWith("--port=")) ? [] : ["--port=0"];
  // What is kept goes with the folder of models, unless a check keeps it elsewhere.
  const kept = flags.some((flag) => flag.startsWith("--data-dir=")) ? [] : [`--data-dir=${fs.mkdtempSync(path.join(models, "kept-"))}`];
  const argv = ["serve", ...port, `--models=${models}`, "--threads=2", ...kept, ...flags];
  const child = spawn(program, argv, { stdio: ["ignore", "pipe", fs.openSync(log, "a")] });
  const ended = new Promise((resolve) => child.on("exit", (code, signal) => resolve(code ?? signal)));
  const end = (signal) => {
    child.kill(signal);
    return ended;
  };
  const base = await new Promise((resolve, reject) => {
    let said = "";
    child.stdout.on("data", (text) => {
      said += text;
      const address = /http:\/\/[^\s/]+/.exec(said);
      if (address) resolve(address[0]);
    });
    ended.then((code) => reject(new Error(`${program} ended early with ${code}; see ${log}`)));
  });
  return { base, stop: () => end("SIGTERM"), kill: () => end("SIGKILL") };
}

/** The newest of the programs that cargo has built. */
export function newestBinary() {
  const built = ["debug", "release"].map((profile) => path.join(ROOT, "target", profile, "understudy"));
  const [newest] = built.filter(fs.existsSync).sort((a, b) => fs.statSync(b).mtimeMs - fs.statSync(a).mtimeMs);
  if (!newest) throw new Error("no target/*/understudy: run `cargo build` first, or name a binary");
  return newest;
}
