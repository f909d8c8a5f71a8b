#!/usr/bin/env python3
"""How half the width, fewer steps, pruning and 8 bits compose: one table and one picture.

    python3 distill/experiments/composition.py score --data FOLDER     distances of every row in every type
    python3 distill/experiments/composition.py speed                   milliseconds, images per second, memory, bytes
    python3 distill/experiments/composition.py table                   prints the table
    python3 distill/experiments/composition.py picture FILE.svg        draws it; needs matplotlib

`run.py` makes the students first, in the same --work. What is there already is not scored again. A row's `interaction` is its
distance, over the teacher's, divided by the product of what each saving costs alone: above 1 they cost more together.
"""

import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path

from run import FEW_SAMPLES, RESULTS, ROOT, STUDENT, TEACHER, processor, serving_folders, in_turns, generate, write

TEACHERS_STEPS = 20
# Row: its model, a bundled one or a row of run.py; its evaluations; what is saved, and the rows that save it alone.
ROWS = {
    "teacher": (TEACHER, TEACHERS_STEPS, "teacher's width", ()),
    "wide-4-matched": (None, 4, "teacher's width", ()),
    "wide-2-matched": (None, 2, "teacher's width", ()),
    "student": (STUDENT, TEACHERS_STEPS, "half its width", ()),
    "few-4-matched": (None, 4, "half its width", ("student", "wide-4-matched")),
    "few-2-matched": (None, 2, "half its width", ("student", "wide-2-matched")),
    "few-1-matched": (None, 1, "half its width", ()),
    "pruned-half": (None, TEACHERS_STEPS, "pruned", ()),
    "pruned-half-2-matched": (None, 2, "pruned", ("pruned-half", "wide-2-matched")),
}
TYPES = ("f32", "bf16", "int8")
ROUNDS = 5


def folder(row, options):
    bundled = ROWS[row][0]
    return ROOT / "models/zoo" / bundled if bundled else options.work / f"{row}-{options.seed}"


def made(row, dtype, options):
    """The folder of a row's model for a type, which is made where it is not there."""
    path = folder(row, options)
    if dtype != "int8":
        return path
    codes = options.work / f"{path.name}-int8"
    if not codes.exists():
        run(["quantize", f"--model={path}", f"--steps={ROWS[row][1]}", f"--out={codes}"], options)
    return codes


def run(command, options):
    environment = {**os.environ, "UNDERSTUDY_MODELS": str(ROOT / "models/zoo")}
    return subprocess.run([options.understudy, *command], env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def there(options):
    rows = [row for row in ROWS if (folder(row, options) / "model_index.json").exists()]
    return [(row, dtype) for row in rows for dtype in TYPES]


def name(row, dtype, options):
    return f"composition-{row}-{dtype}-{options.seed}"


def score(options):
    own = options.work / "teachers-own.npz"
    if not own.exists():
        raise SystemExit(f"{own}: is not there; `run.py teacher-ddim-20` makes it")
    for row, dtype in there(options):
        if (RESULTS / f"{name(row, dtype, options)}.json").exists():
            continue
        scores = {}
        for key, reference in (("data", options.data / "train-images-idx3-ubyte.gz"), ("teacher", own)):
            out = options.work / f"{name(row, dtype, options)}.{key}.json"
            flags = {
                "model": made(row, dtype, options),
                "reference": reference,
                "dtype": dtype,
                "n": FEW_SAMPLES,
                "steps": ROWS[row][1],
                "scheduler": "ddim",
                "seed": options.seed * FEW_SAMPLES,
                "threads": options.threads,
                "out": out,
            }
            if not out.exists():
                run(["evaluate", *(f"--{flag}={value}" for flag, value in flags.items())], options)
            scores[key] = json.loads(out.read_text())["scores"]
        write(name(row, dtype, options), {
            "row": row, "dtype": dtype, "seed": options.seed, "num_inference_steps": ROWS[row][1], "samples": FEW_SAMPLES,
            "machine": {"processor": processor()}, "to_data": scores["data"], "to_teachers_images": scores["teacher"],
        })


def speed(options):
    """Rows in every type in turns: alone at batch 1 and 8, then through one server for each type."""
    timed_rows = [(row, dtype) for row, dtype in there(options) if row in (options.row or ROWS)]
    measured = {f"{row} {dtype}": {"milliseconds": {1: [], 8: []}} for row, dtype in timed_rows}
    for _ in range(options.rounds):
        for row, dtype in timed_rows:
            for batch in (1, 8):
                words = ["bench", f"--model={made(row, dtype, options)}", f"--dtype={dtype}", f"--batch={batch}",
                         f"--steps={ROWS[row][1]}", "--seconds=1", f"--threads={options.threads}", "--json"]
                told = json.loads(run(words, options))
                of = measured[f"{row} {dtype}"]
                # Of one image, its own steps and all that is around the network.
                of["milliseconds"][batch].append(1000 / told["images_per_second"])
                of |= {"weight_bytes": told["weight_bytes"], "resident_bytes": told["max_rss_bytes"]}
    for row, dtype in timed_rows:
        of = measured[f"{row} {dtype}"]
        files = made(row, dtype, options).glob("unet/*.safetensors")
        of["file_bytes"] = sum(file.stat().st_size for file in files)
        of["milliseconds"] = {batch: round(statistics.median(each), 3) for batch, each in of["milliseconds"].items()}
    for dtype in TYPES:
        rows = [row for row, of in timed_rows if of == dtype]
        folders = {row: made(row, dtype, options) for row in rows}
        with serving_folders(options, folders, dtype) as url:
            timed = {row: (row, ROWS[row][1]) for row in rows}
            rates = in_turns(timed, options.rounds, 800, 8, lambda model, steps: generate(url, model, 8, steps))
        for row in rows:
            measured[f"{row} {dtype}"]["images_per_second_over_http"] = round(statistics.median(rates[row]), 1)
    # What was timed before stays, where some rows were asked for.
    file = RESULTS / f"composition-speed-{options.seed}.json"
    earlier = json.loads(file.read_text())["rows"] if options.row and file.exists() else {}
    write(f"composition-speed-{options.seed}", {
        "machine": {"processor": processor(), "threads": options.threads}, "rounds": options.rounds, "rows": earlier | measured,
    })


def results(options):
    """What was scored and timed, by row and type; the teacher's first."""
    file = RESULTS / f"composition-speed-{options.seed}.json"
    speeds = json.loads(file.read_text())["rows"] if file.exists() else {}
    found = {}
    for row in ROWS:
        for dtype in TYPES:
            scored = RESULTS / f"{name(row, dtype, options)}.json"
            if scored.exists():
                found[row, dtype] = json.loads(scored.read_text()) | speeds.get(f"{row} {dtype}", {})
    return found


def distance(result, key="to_data"):
    return next(value for score, value in result[key].items() if score.startswith("FD"))


def interaction(found, row, dtype):
    """The distance over the product of what the savings cost alone; nothing where one of them alone was not measured."""
    teacher = distance(found["teacher", "f32"])
    alone = [(other, "f32") for other in ROWS[row][3]]
    if not alone:
        alone = [(row, "f32")] if row != "teacher" else []
    if dtype != "f32":
        alone.append(("teacher", dtype))
    if len(alone) < 2 or any(one not in found for one in alone):
        return None
    product = 1
    for one in alone:
        product *= distance(found[one]) / teacher
    return distance(found[row, dtype]) / teacher / product


def table(options):
    found = results(options)
    print("| network | evaluations | type | FD to the data | ÷ teacher's | to the teacher's images | KID × 1000 | P | R | class | "
          "ms, batch 1, 8 | images/s over HTTP | file | resident | interaction |")
    print("| --- " * 15 + "|")
    teacher = distance(found["teacher", "f32"])
    for (row, dtype), result in found.items():
        scores, together = result["to_data"], interaction(found, row, dtype)
        timed = "milliseconds" in result
        cells = [
            ROWS[row][2],
            str(ROWS[row][1]),
            dtype,
            f"{distance(result):.2f}",
            f"{distance(result) / teacher:.2f}",
            f"{distance(result, 'to_teachers_images'):.2f}",
            f"{scores['kernel_distance'] * 1000:.1f}",
            f"{scores['precision']:.3f}",
            f"{scores['recall']:.3f}",
            f"{scores['class_agreement']:.3f}",
            ", ".join(f"{value:.2f}" for value in result["milliseconds"].values()) if timed else "",
            str(result["images_per_second_over_http"]) if timed else "",
            f"{result['file_bytes'] / 1e6:.1f} MB" if timed else "",
            f"{result['resident_bytes'] / 2**20:.0f} MiB" if timed else "",
            "" if together is None else f"{together:.2f}",
        ]
        print("| " + " | ".join(cells) + " |")


def picture(options):
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "understudy", "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False}
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator

    found = results(options)
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    looks = {"teacher's width": ("#444444", "o"), "half its width": ("#0a7d5a", "s"), "pruned": ("#b3541e", "^")}
    for width, (colour, marker) in looks.items():
        points = [(found[row, "f32"], steps) for row, (_, steps, of, _) in ROWS.items() if of == width and (row, "f32") in found]
        points = [(result["milliseconds"]["8"], distance(result), steps) for result, steps in points if "milliseconds" in result]
        axes.scatter(*zip(*[point[:2] for point in points]), color=colour, marker=marker, s=46, label=width, zorder=3)
        for time, far, steps in points:
            axes.annotate(f"{steps}", (time, far), textcoords="offset points", xytext=(7, 4), fontsize=9, color=colour)
    axes.set(xscale="log", yscale="log", xlabel="milliseconds an image, batch of 8", ylabel="distance to the data; lower is better")
    for axis, ticks in ((axes.xaxis, (0.5, 1, 2, 5, 10, 20)), (axes.yaxis, (0.2, 0.3, 0.5, 1, 2))):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    axes.grid(which="both", color="#eeeeee", zorder=0)
    axes.legend(frameon=False, title="network; the number is its evaluations")
    figure.savefig(options.file, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["score", "speed", "table", "picture"])
    parser.add_argument("file", nargs="?", type=Path, help="the picture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--work", type=Path, default=ROOT / "target/experiments", help="where run.py made the students")
    parser.add_argument("--understudy", default=str(ROOT / "target/release/understudy"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--row", action="append", choices=ROWS, help="what speed times [default: all]; may be given several times")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of speed")
    options = parser.parse_args()
    if options.what == "score" and options.data is None:
        parser.error("--data: name the folder of train-images-idx3-ubyte.gz")
    if options.what == "picture" and options.file is None:
        parser.error("picture: name the file")
    {"score": score, "speed": speed, "table": table, "picture": picture}[options.what](options)


if __name__ == "__main__":
    main()
