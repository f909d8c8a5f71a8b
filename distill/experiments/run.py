#!/usr/bin/env python3
"""The experiment that decides: one student architecture, taught in different ways on one budget.

    python3 distill/experiments/run.py ROW --seed 0 --data FOLDER    trains and scores a row
    python3 distill/experiments/run.py speed                         images per second through the server
    python3 distill/experiments/run.py table                         prints the tables of all results

ROW is one of the keys of ROWS below, or of FEW (students of few steps), PRUNED (students out of the teacher's
channels) or SAMPLED (what they are held against). FOLDER holds Fashion-MNIST's idx files; only `data` and `data-v` learn from
them, all rows are scored against them. A row that was
interrupted goes on where it was when the same command is given again. Needs nothing but Python and the
`understudy` binary (`cargo build --release`).

The budget, the same for all: STEPS steps of the student, and at most EVALUATIONS evaluations of the teacher
(counted in images), of which filling the pool takes its part.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = HERE / "results"
TEACHER = "fashion-mnist-teacher"
STUDENT = "fashion-mnist-student"
STUDENT_CONFIG = ROOT / "configs/fashion-mnist-unet.json"

STEPS = 5000
BATCH = 32
EVALUATIONS = 240_000
TRAINING = {
    "steps": STEPS,
    "batch": BATCH,
    "learning-rate": "1e-3",
    "learning-rate-schedule": "cosine",
    "warmup-steps": 100,
    "ema": 0.999,
    "sample-every": 0,
}
# The paper's walk is the teacher's full trajectory, of 1000 steps. 0.005 of these times 32 are 160 samples; to
# fill the pool each is walked 500 steps on average, so 80,000 evaluations, and 160,000 for the lessons.
PAPER = {"walk-steps": 1000, "init": "random"}
# 50 evaluations an image.
BASELINE = {"method": "data-free-baseline", "samples": EVALUATIONS // 50, "walk-steps": 50, "walk-sampler": "ddim"}
DYNAMIC = {"schedule": "dynamic", "rho": 0.005, **PAPER}
# Beyond the paper: 3,200 samples, walked 24.5 of 50 steps to fill the pool, which are 78,000 evaluations.
STRIDED = {"schedule": "dynamic", "rho": 0.1, "walk-steps": 50}
# Beyond the paper: the student predicts v, and errors count as errors in v.
VELOCITY = {"prediction": "v_prediction", "weighting": "velocity"}
ROWS = {
    "teacher": None,
    "data": {},
    # Training on data takes its prediction from a schedule; this one is the teacher's, predicting v.
    "data-v": {"weighting": "velocity", "noise-schedule": ROOT / "models/zoo" / STUDENT / "scheduler/scheduler_config.json"},
    "baseline": BASELINE,
    "baseline-v": {**BASELINE, **VELOCITY},
    "iterative": {"schedule": "iterative", **PAPER},
    "shuffled": {"schedule": "shuffled", **PAPER},
    "dynamic": DYNAMIC,
    "dynamic-v": {**DYNAMIC, **VELOCITY},
    "strided": {**STRIDED, "init": "pruned"},
    "ours-random": {**STRIDED, "init": "random", **VELOCITY},
    "ours-uniform": {**STRIDED, "init": "pruned", "prediction": "v_prediction"},
    "ours": {**STRIDED, "init": "pruned", **VELOCITY},
}
NAMES = {
    "teacher": "teacher",
    "data": "student on the data",
    "data-v": "student on the data, predicting v, weighted as v",
    "baseline": "data-free baseline",
    "baseline-v": "data-free baseline, predicting v, weighted as v",
    "iterative": "DKDM, iterative",
    "shuffled": "DKDM, shuffled iterative",
    "dynamic": "DKDM, dynamic iterative",
    "dynamic-v": "DKDM, dynamic iterative, predicting v, weighted as v",
    "strided": "dynamic, strided, pruned start",
    "ours-random": "ours, with a random start",
    "ours-uniform": "ours, with all errors weighted alike",
    "ours": "dynamic, strided, pruned start, predicting v, weighted as v (ours)",
}
SAMPLES = 10_000
SAMPLING_STEPS = 20

# Students of few steps, each from one before: evaluations, and what it goes on from, a row or a bundled model.
FEW = {
    "few-4": (4, STUDENT),
    "few-2": (2, "few-4"),
    "few-1": (1, "few-2"),
    "few-4-long": (4, "few-4"),
    "few-4-matched": (4, "few-4"),
    "few-2-matched": (2, "few-2"),
    "few-1-matched": (1, "few-1"),
    "few-1-matched-long": (1, "few-1"),
    # Of the teacher's width, from its weights.
    "wide-4": (4, TEACHER),
    "wide-4-matched": (4, "wide-4"),
    "wide-2": (2, "wide-4"),
    "wide-2-matched": (2, "wide-2"),
    "pruned-half-2": (2, "pruned-half"),
    "pruned-half-2-matched": (2, "pruned-half-2"),
}
FEW_TRAINING = {"batch": 32, "rho": 0.02, "sample-every": 0}
# At the default rate, which stays, so that the run may go on for longer: what is kept is the running average. So many steps
# fitted beside other work.
MATCHED = {
    "method": "distribution-matching",
    "steps": 282,
    "learning-rate-schedule": "constant",
    "sample-every": 250,
}
FEW_LENGTH = {
    "few-4": {"steps": 6_000, "learning-rate": "1e-3"},
    "few-2": {"steps": 4_000, "learning-rate": "1e-3"},
    "few-1": {"steps": 4_000, "learning-rate": "1e-3"},
    "few-4-long": {"steps": 20_000, "learning-rate": "1e-3", "rho": 0.04},
    "few-4-matched": MATCHED,
    "few-2-matched": MATCHED,
    "few-1-matched": MATCHED,
    "few-1-matched-long": {**MATCHED, "steps": 1_128},
    "wide-4": {"steps": 2_000, "learning-rate": "5e-4"},
    "wide-4-matched": MATCHED,
    "wide-2": {"steps": 2_000, "learning-rate": "5e-4"},
    "wide-2-matched": MATCHED,
    "pruned-half-2": {"steps": 2_000, "learning-rate": "1e-3"},
    "pruned-half-2-matched": MATCHED,
}
FEW_SAMPLES = 2_000
# Bundled models in few steps of samplers that need no training: model, sampler, evaluations. At 4 to 10 DPM-Solver++ is
# the best of all samplers here, from 20 on DDIM.
SAMPLED = {
    **{f"teacher-dpm++-{steps}": (TEACHER, "dpm++", steps) for steps in (1, 2, 4, 6, 8, 10)},
    **{f"teacher-ddim-{steps}": (TEACHER, "ddim", steps) for steps in (4, 10, 20, 50)},
    **{f"student-dpm++-{steps}": (STUDENT, "dpm++", steps) for steps in (1, 2, 4, 10)},
    **{f"student-ddim-{steps}": (STUDENT, "ddim", steps) for steps in (4, 20)},
}
# Students out of the teacher's channels, taught alike by DKDM: what `understudy prune --time` is told, or nothing for the
# narrowest of the teacher's own shape, as `--student 0.5x` finds it. A quarter is not reached: the smallest network takes 0.42.
PRUNED = {"narrowed": None, "pruned-half": "0.5x"}
PRUNED_TRAINING = {"steps": 1_500, "batch": 32, "learning-rate": "1e-3", "ema": 0.99, "rho": 0.02, "sample-every": 0}
# What `speed` times: model and steps.
TIMED = {
    "teacher, 50 steps": (TEACHER, 50),
    "teacher, 20 steps": (TEACHER, 20),
    "student, 20 steps": (STUDENT, 20),
    "student of 4 steps": (f"{STUDENT}-4", 4),
    "student of 4 steps, in 1": (f"{STUDENT}-4", 1),
}
ROUNDS = 9
# The teacher's own images: as its card says, of other seeds than any row's.
TEACHERS_OWN = {"steps": 50, "scheduler": "ddim", "seed": 1_000_000}


def training(row, options, out):
    """The command that trains a row's student, or nothing for the teacher."""
    if ROWS[row] is None:
        return None
    flags = {**TRAINING, **ROWS[row], "seed": options.seed, "out": out, "threads": options.threads}
    if row in ("data", "data-v"):
        images = options.data / "train-images-idx3-ubyte.gz"
        flags |= {"data": images, "config": STUDENT_CONFIG, "baseline-of": TEACHER}
        command = "train"
    else:
        flags |= {"teacher": TEACHER, "student": STUDENT_CONFIG, "dtype": options.teacher_dtype}
        # What the teacher does, unless the row says another.
        flags.setdefault("prediction", "epsilon")
        command = "distill"
    more = ["--no-report"] if command == "distill" else []
    return [command, *(f"--{name}={value}" for name, value in flags.items()), *more]


def scoring(row, options, model, out):
    """The command that scores a row's model; seeds of images differ between seeds of rows."""
    flags = {
        "model": model,
        "reference": options.data / "train-images-idx3-ubyte.gz",
        "n": SAMPLES,
        "steps": SAMPLING_STEPS,
        "scheduler": "ddim",
        "seed": options.seed * SAMPLES,
        "threads": options.threads,
        "out": out,
    }
    return ["evaluate", *(f"--{name}={value}" for name, value in flags.items())]


def few(row, options, out):
    """The command that trains a student of few steps."""
    evaluations, start = FEW[row]
    # Seeds of distribution matching begin with the same student.
    begun = 0 if FEW_LENGTH[row].get("method") else options.seed
    flags = {
        "teacher": TEACHER,
        "student": options.work / f"{start}-{begun}" if start in {**FEW, **PRUNED} else ROOT / "models/zoo" / start,
        "evaluations": evaluations,
        **FEW_TRAINING,
        **FEW_LENGTH[row],
        "seed": options.seed,
        "out": out,
        "threads": options.threads,
        "dtype": options.teacher_dtype,
    }
    return ["distill", *(f"--{name}={value}" for name, value in flags.items()), "--no-report"]


def pruned(row, options, out):
    """The commands that make a student of the teacher's channels, and teach it; each with the folder it makes."""
    student, commands = STUDENT_CONFIG, []
    if PRUNED[row] is not None:
        student = options.work / f"{out.name}-untaught"
        flags = {"model": TEACHER, "time": PRUNED[row], "out": student, "seed": options.seed, "threads": options.threads}
        commands.append((student, ["prune", *(f"--{name}={value}" for name, value in flags.items())]))
    flags = {
        "teacher": TEACHER,
        "student": student,
        **({"init": "pruned"} if PRUNED[row] is None else {}),
        **PRUNED_TRAINING,
        "seed": options.seed,
        "out": out,
        "threads": options.threads,
        "dtype": options.teacher_dtype,
    }
    return [*commands, (out, ["distill", *(f"--{name}={value}" for name, value in flags.items()), "--no-report"])]


def distances(model, sampler, steps, options, name):
    """The commands that score a model's images against the data, and against the teacher's own images."""
    same = {"n": FEW_SAMPLES, "threads": options.threads}
    mine = {"model": model, "scheduler": sampler, "steps": steps, "seed": options.seed * FEW_SAMPLES, **same}
    own = options.work / "teachers-own.npz"
    commands = {
        own: {"model": TEACHER, **TEACHERS_OWN, **same, "write-stats": own},
        options.work / f"{name}.data.json": {**mine, "reference": options.data / "train-images-idx3-ubyte.gz"},
        options.work / f"{name}.teacher.json": {**mine, "reference": own},
    }
    for out, flags in commands.items():
        if out != own:
            flags["out"] = out
    return {out: ["evaluate", *(f"--{key}={value}" for key, value in flags.items())] for out, flags in commands.items()}


def run_few(row, options):
    """A row of the second table: a student of few steps, or what it is held against."""
    name = f"{row}-{options.seed}"
    options.work.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "UNDERSTUDY_MODELS": str(ROOT / "models/zoo")}
    result = {"row": row, "seed": options.seed, "commands": []}
    commands = []
    if row in SAMPLED:
        model, sampler, steps = SAMPLED[row]
    else:
        model, sampler, steps = options.work / name, "ddim", FEW[row][0] if row in FEW else SAMPLING_STEPS
        commands = [(model, few(row, options, model))] if row in FEW else pruned(row, options, model)
    for folder, command in commands:
        # One that is finished is not made again.
        if not (folder / "model_index.json").exists():
            subprocess.run([options.understudy, *map(str, command)], env=environment, check=True)
        result["commands"].append(shown(command, options))
    scores = {}
    for out, command in distances(model, sampler, steps, options, name).items():
        if not out.exists():
            subprocess.run([options.understudy, *map(str, command)], env=environment, check=True)
        result["commands"].append(shown(command, options))
        if out.suffix == ".json":
            told = json.loads(out.read_text())["scores"]
            against = "_to_teacher" if ".teacher" in out.name else ""
            scores |= {key + against if key.startswith("FD") else key: value for key, value in told.items()}
    result |= {
        "machine": {"processor": processor(), "threads": options.threads},
        "model": row,
        "scheduler": sampler,
        "num_inference_steps": steps,
        "samples": FEW_SAMPLES,
        "first_image_seed": options.seed * FEW_SAMPLES,
        "scores": scores,
    }
    if commands:
        result |= told_of(model)
    if row in PRUNED:
        student = commands[0][0] / "understudy.json"
        result["pruning"] = json.loads(student.read_text())["recipe"].get("pruning")
    write(name, result)


def told_of(model):
    """What a trained model's folder says of its training."""
    recipe = json.loads((model / "understudy.json").read_text())["recipe"]
    log = (model / "training/log.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in log[-200:]]
    return {
        "student_steps": recipe["student_steps"],
        "teacher_evaluations": recipe["teacher_evaluations"],
        "training_minutes": round(recipe["seconds"] / 60, 1),
        "loss_of_last_200_steps": sum(losses) / len(losses),
    }


def shown(command, options):
    """A command as it is told, without the places of this machine."""
    words = [str(word) for word in command]
    for place, name in ((options.data, "DATA"), (options.work, "WORK"), (ROOT, ".")):
        words = [word.replace(str(place), name) for word in words]
    return "understudy " + " ".join(words)


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def run(row, options):
    name = f"{row}-{options.seed}"
    model = ROOT / "models/zoo" / TEACHER if ROWS[row] is None else options.work / name
    scores = options.work / f"{name}.scores.json"
    options.work.mkdir(parents=True, exist_ok=True)
    commands = [training(row, options, model), scoring(row, options, model, scores)]
    environment = {**os.environ, "UNDERSTUDY_MODELS": str(ROOT / "models/zoo")}
    began = time.time()
    for command in commands:
        if command and not (command[0] == "evaluate" and scores.exists()):
            subprocess.run([options.understudy, *map(str, command)], env=environment, check=True)
    result = {
        "row": row,
        "seed": options.seed,
        "commands": [shown(command, options) for command in commands if command],
        "machine": {"processor": processor(), "threads": options.threads},
        "minutes_since_last_start": round((time.time() - began) / 60, 1),
        **json.loads(scores.read_text()),
    }
    # The scores' own are a folder and the first image's.
    result |= {"model": row, "seed": options.seed, "first_image_seed": options.seed * SAMPLES}
    if ROWS[row] is not None:
        result |= told_of(model)
    write(name, result)


def write(name, result):
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(result, indent=2) + "\n"
    temporary = RESULTS / f".{name}.json"
    temporary.write_text(text)
    temporary.rename(RESULTS / f"{name}.json")
    print(text)


def serving(options):
    """The address of a server of the bundled models."""
    return served(options, [f"--models={ROOT / 'models/zoo'}"])


def serving_folders(options, folders, dtype):
    """The address of a server of model folders by their names, in that type."""
    return served(options, [f"--dtype={dtype}", *(f"--model={name}={folder}" for name, folder in folders.items())])


@contextlib.contextmanager
def served(options, models):
    command = [options.understudy, "serve", "--port=0", f"--threads={options.threads}", *models]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "RUST_LOG": "warn"})
    try:
        url = next(found.group() for line in server.stdout if (found := re.search(r"http://[0-9.:]+", line)))
        while not ready(url):
            time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        server.wait()


def speed(options):
    """Images per second through the server, by images in a request: each of TIMED in turns."""
    with serving(options) as url:
        result = {"machine": {"processor": processor(), "threads": options.threads}, "rounds": ROUNDS}
        for count in (1, 8, 16):
            rates = in_turns(TIMED, ROUNDS, 1600, count, lambda model, steps: generate(url, model, count, steps))
            of_all = {}
            for name, each in rates.items():
                of_all[name] = {"images_per_second": round(statistics.median(each), 1)}
                for teacher in ("teacher, 20 steps", "teacher, 50 steps"):
                    ratios = [rate / base for rate, base in zip(each, rates[teacher])]
                    of_all[name][f"times {teacher}"] = round(statistics.median(ratios), 2)
            result[f"{count} images a request"] = of_all
        write("speed", result)


def in_turns(timed, rounds, evaluations, count, ask):
    """Images per second of each of `timed` in each round, by requests of `count` images; as many evaluations of each a round."""
    rates = {name: [] for name in timed}
    for _ in range(rounds):
        for name, (model, steps) in timed.items():
            requests = max(1, evaluations // steps // count)
            began = time.monotonic()
            for _ in range(requests):
                ask(model, steps)
            rates[name].append(requests * count / (time.monotonic() - began))
    return rates


def ready(url):
    try:
        return urllib.request.urlopen(url + "/health").status == 200
    except OSError:
        return False


def generate(url, model, count, steps):
    body = {"model": model, "n": count, "seed": 0, "num_inference_steps": steps, "scheduler": "ddim"}
    request = urllib.request.Request(
        url + "/v1/images/generations", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        assert len(json.load(reply)["data"]) == count


def table():
    """Means over seeds, and between two of them the half of their difference as ±."""
    print("| row | seeds | FD-fashion-mnist-judge | IS | KID × 1000 | P | R | class | teacher evaluations |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for row, name in NAMES.items():
        results = [json.loads(file.read_text()) for file in sorted(RESULTS.glob(f"{row}-[0-9]*.json"))]
        if not results:
            continue
        scores = [result["scores"] for result in results]

        def cell(score, digits, factor=1):
            values = [each[score] * factor for each in scores]
            mean = sum(values) / len(values)
            spread = f" ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
            return f"{mean:.{digits}f}{spread}"

        distance = next(key for key in scores[0] if key.startswith("F"))
        cells = [
            name,
            ", ".join(str(result["seed"]) for result in results),
            cell(distance, 2),
            cell("inception_score", 2),
            cell("kernel_distance", 2, 1000),
            cell("precision", 3),
            cell("recall", 3),
            cell("class_agreement", 3),
            f"{results[0].get('teacher_evaluations', 0):,}",
        ]
        print("| " + " | ".join(cells) + " |")


def few_table():
    """The second table: students of few steps and what they are held against."""
    print("| row | evaluations | FD to the data | FD to the teacher's images | KID × 1000 | P | R | class |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for row in [*SAMPLED, *FEW, *PRUNED]:
        for file in sorted(RESULTS.glob(f"{row}-[0-9].json")):
            result = json.loads(file.read_text())
            scores = result["scores"]
            data, teacher = (scores.get(f"FD-fashion-mnist-judge{suffix}") for suffix in ("", "_to_teacher"))
            model = {TEACHER: "teacher", STUDENT: "DKDM student"}.get(SAMPLED.get(row, [None])[0], "student of few steps")
            cells = [
                f"{model}, {result['scheduler']}" + (f", seed {result['seed']}" if result["seed"] else ""),
                str(result["num_inference_steps"]),
                f"{data:.2f}",
                f"{teacher:.2f}",
                f"{scores['kernel_distance'] * 1000:.1f}",
                f"{scores['precision']:.3f}",
                f"{scores['recall']:.3f}",
                f"{scores['class_agreement']:.3f}",
            ]
            print("| " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", choices=[*ROWS, *FEW, *SAMPLED, *PRUNED, "speed", "table"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--work", type=Path, default=ROOT / "target/experiments", help="where students are made")
    parser.add_argument("--understudy", default=str(ROOT / "target/release/understudy"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--teacher-dtype", default="bf16", help="f32 on a processor without AVX512-BF16")
    options = parser.parse_args()
    if options.row == "table":
        table()
        print()
        return few_table()
    if options.row == "speed":
        return speed(options)
    if options.data is None:
        sys.exit("--data: name the folder of train-images-idx3-ubyte.gz")
    run_few(options.row, options) if options.row in {**FEW, **SAMPLED, **PRUNED} else run(options.row, options)


if __name__ == "__main__":
    main()
