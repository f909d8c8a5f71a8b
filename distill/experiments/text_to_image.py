#!/usr/bin/env python3
"""The experiment with text: students of the bundled text-to-image teacher, which draws emoji from captions.

    python3 distill/experiments/emoji.py FOLDER                      makes the captioned pictures
    understudy train-judge --data FOLDER/seen --test-data FOLDER/held-out --epochs 15 --least-accuracy 0.5 --out emoji-judge
    python3 distill/experiments/text_to_image.py ROW --pictures FOLDER --judge emoji-judge     trains and scores a row
    python3 distill/experiments/text_to_image.py speed               images per second through the server
    python3 distill/experiments/text_to_image.py table               prints the table of all results

ROW is one of ROWS. Students see captions, never pictures, but for `emoji-data`; pictures are what all rows are scored against: the distance in the
features of a judge of style and group, and whether the nearest picture has the caption that was asked for, on captions
seen and on pairs of thing and style held out. A row that was interrupted goes on where it was. Needs nothing but Python and
the `understudy` binary (`cargo build --release`).
"""

import argparse
import json
import os
import statistics
import subprocess
import urllib.request
from pathlib import Path

from run import HERE, RESULTS, ROOT, in_turns, processor, serving, shown, told_of, write

TEACHER = "emoji-text-to-image"
STUDENT = f"{TEACHER}-student"
PROMPTS = HERE / "prompts/emoji.txt"
SCALE = 3
TRAINING = {"steps": 6_000, "batch": 16, "learning-rate": "1e-3", "sample-every": 0, "checkpoint-every": 500}
GUIDED = {"student": ROOT / "configs/emoji-unet-guided.json", "guidance": ["distil", "1..6"], "rho": 0.06}
KEPT = {"student": ROOT / "configs/emoji-unet.json", "guidance": ["keep"], "batch": 32, "rho": 0.06, "dtype": "bf16"}
# With the evaluations of the teacher that `emoji-distil` makes: two rows a step of each sample.
DRAWN = {"method": "data-free-baseline", "samples": 4_800, "walk-steps": 25, "walk-sampler": "ddim"}
# At the default rate, which stays: what is kept is the running average.
MATCHED = {
    "method": "distribution-matching",
    "steps": 1_500,
    "rho": 0.02,
    "learning-rate-schedule": "constant",
    "sample-every": 250,
    "checkpoint-every": 250,
    "dtype": "bf16",
}
# Models as they are: model, sampler, evaluations.
SAMPLED = {
    "emoji-teacher-25": (TEACHER, "ddim", 25),
    "emoji-teacher-8": (TEACHER, "dpm++", 8),
    "emoji-teacher-4": (TEACHER, "dpm++", 4),
}
# Shown the pictures, with their captions.
DATA = {"config": KEPT["student"], "components": TEACHER, "baseline-of": TEACHER}
# Students: how they are taught, and in how many evaluations they are sampled.
TAUGHT = {
    "emoji-keep": ({**KEPT, "init": "pruned"}, 25),
    "emoji-keep-random": ({**KEPT, "init": "random"}, 25),
    "emoji-distil": ({**GUIDED, "init": "pruned"}, 25),
    # Twice as many trajectories, each after a prompt of its own, for the same evaluations.
    "emoji-distil-25": ({**GUIDED, "init": "pruned", "walk-steps": 25}, 25),
    "emoji-distil-random": ({**GUIDED, "init": "random"}, 25),
    "emoji-data": (DATA, 25),
    "emoji-baseline": ({"student": GUIDED["student"], "guidance": GUIDED["guidance"], "init": "pruned", **DRAWN}, 25),
    "emoji-4": ({"student": "emoji-distil", "guidance": ["distil", "1..6"], "evaluations": 4, "steps": 4_000, "rho": 0.02}, 4),
    "emoji-4-long": ({"student": "emoji-4", "guidance": ["distil", "1..6"], "evaluations": 4, "steps": 8_000, "batch": 32, "rho": 0.04, "dtype": "bf16"}, 4),
    "emoji-4-matched": ({"student": "emoji-4", "guidance": ["distil", "1..6"], "evaluations": 4, **MATCHED}, 4),
    "emoji-4-longer": ({"student": "emoji-4-long", "guidance": ["distil", "1..6"], "evaluations": 4, "steps": 16_000, "batch": 32, "rho": 0.04, "dtype": "bf16"}, 4),
    "emoji-4-longer-matched": ({"student": "emoji-4-longer", "guidance": ["distil", "1..6"], "evaluations": 4, **MATCHED, "steps": 500}, 4),
    "emoji-4-longest": ({"student": "emoji-4-longer", "guidance": ["distil", "1..6"], "evaluations": 4, "steps": 20_000, "batch": 32, "rho": 0.04, "dtype": "bf16"}, 4),
    "emoji-4-longest-matched": ({"student": "emoji-4-longest", "guidance": ["distil", "1..6"], "evaluations": 4, **MATCHED, "steps": 500}, 4),
    "emoji-4-long-matched": ({"student": "emoji-4-long", "guidance": ["distil", "1..6"], "evaluations": 4, **MATCHED, "steps": 500}, 4),
}
ROWS = [*SAMPLED, *TAUGHT]
SAMPLES = {"seen": 2_000, "held-out": 772}
# What `speed` times: model, steps.
TIMED = {"teacher, 25 steps": (TEACHER, 25), "student of 4 steps": (f"{STUDENT}-4", 4)}
ROUNDS = 7


def training(row, options, out):
    how, _ = TAUGHT[row]
    if how is DATA:
        flags = {"data": options.pictures / "seen", **DATA, **TRAINING, "seed": options.seed, "threads": options.threads, "out": out}
        return ["train", *(f"--{name}={value}" for name, value in flags.items())]
    flags = {"teacher": TEACHER, "prompts": PROMPTS, **TRAINING, **how, "seed": options.seed, "threads": options.threads, "out": out}
    if how["student"] in TAUGHT:
        flags["student"] = options.work / f"{how['student']}-{options.seed}"
    if "method" in how:
        del flags["learning-rate"]
    guidance = flags.pop("guidance")
    return ["distill", "--guidance", *guidance, *(f"--{name}={value}" for name, value in flags.items()), "--no-report"]


def scoring(part, model, sampler, steps, options, out):
    flags = {
        "model": model,
        "prompts": options.pictures / f"{part}.txt",
        "reference": options.pictures / "all",
        "features": options.judge,
        "scheduler": sampler,
        "steps": steps,
        "guidance-scale": SCALE,
        "n": SAMPLES[part],
        "seed": options.seed * 10_000,
        "threads": options.threads,
        "out": out,
    }
    return ["evaluate", *(f"--{name}={value}" for name, value in flags.items())]


def told(command, options):
    """A command without the places of this machine."""
    return shown([str(word).replace(str(options.judge), "JUDGE") for word in command], options)


def score(row, options):
    name = f"{row}-{options.seed}"
    options.work.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "UNDERSTUDY_MODELS": str(ROOT / "models/zoo")}
    result = {"row": row, "seed": options.seed, "machine": {"processor": processor(), "threads": options.threads}, "commands": []}
    if row in TAUGHT:
        model, sampler, steps = options.work / name, "ddim", TAUGHT[row][1]
        command = training(row, options, model)
        # One that is finished is not trained again.
        if not (model / "model_index.json").exists():
            subprocess.run([options.understudy, *map(str, command)], env=environment, check=True)
        result["commands"].append(told(command, options))
        result |= told_of(model)
    else:
        model, sampler, steps = SAMPLED[row]
    result |= {"scheduler": sampler, "num_inference_steps": steps, "guidance_scale": SCALE}
    for part in SAMPLES:
        out = options.work / f"{name}.{part}.json"
        command = scoring(part, model, sampler, steps, options, out)
        if not out.exists():
            subprocess.run([options.understudy, *map(str, command)], env=environment, check=True)
        result["commands"].append(told(command, options))
        result[part] = {"samples": SAMPLES[part], **json.loads(out.read_text())["scores"]}
    write(name, result)


def speed(options):
    """Guided images per second through the server, by images in a request: each of TIMED in turns."""
    with serving(options) as url:
        result = {"machine": {"processor": processor(), "threads": options.threads}, "rounds": ROUNDS}
        for count in (1, 8):
            rates = in_turns(TIMED, ROUNDS, 200, count, lambda model, steps: generate(url, model, count, steps))
            base = rates["teacher, 25 steps"]
            result[f"{count} images a request"] = {
                name: {
                    "images_per_second": round(statistics.median(each), 2),
                    "times teacher": round(statistics.median(rate / one for rate, one in zip(each, base)), 2),
                }
                for name, each in rates.items()
            }
        write("emoji-speed", result)


def generate(url, model, count, steps):
    body = {"model": model, "prompt": "red apple, noto style", "n": count, "seed": 0, "num_inference_steps": steps,
            "scheduler": "ddim", "guidance_scale": SCALE}
    request = urllib.request.Request(url + "/v1/images/generations", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        assert len(json.load(reply)["data"]) == count


def table():
    print("| row | evaluations | FD | P | R | adherence, seen | adherence, held out |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in ROWS:
        for file in sorted(RESULTS.glob(f"{row}-[0-9].json")):
            result = json.loads(file.read_text())
            seen, held = result["seen"], result["held-out"]
            distance = next(value for key, value in seen.items() if key.startswith("FD"))
            name = f"{row}, {result['scheduler']}" + (f", seed {result['seed']}" if result["seed"] else "")
            cells = [name, str(result["num_inference_steps"]), f"{distance:.2f}", f"{seen['precision']:.3f}", f"{seen['recall']:.3f}",
                     f"{seen['prompt_adherence']:.3f}", f"{held['prompt_adherence']:.3f}"]
            print("| " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=[*ROWS, "speed", "table"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=Path, help="the folder that emoji.py made")
    parser.add_argument("--judge", type=Path, help="the judge's folder")
    parser.add_argument("--work", type=Path, default=ROOT / "target/experiments", help="where students are made")
    parser.add_argument("--understudy", default=str(ROOT / "target/release/understudy"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    options.data = options.pictures
    if options.row == "table":
        return table()
    if options.row == "speed":
        return speed(options)
    if options.pictures is None or options.judge is None:
        parser.error("--pictures and --judge: name the folders")
    score(options.row, options)


if __name__ == "__main__":
    main()
