#!/usr/bin/env python3
"""Understudy beside what else runs a diffusion U-Net on a CPU, in turns, on this machine.

    python3 benches/peers/run.py --setup     # once: an environment of its own, in benches/peers/.venv
    python3 benches/peers/run.py             # builds the release binary, measures, prints, writes JSON

Every runtime has a process of its own and they take turns, so that a machine whose speed drifts
treats them alike: a round gives each runtime's median evaluation, and a ratio is the median of the
rounds' ratios. The processor's own peak is measured in the same rounds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ENVIRONMENT = HERE / ".venv"
TEACHER = "fashion-mnist-teacher"
CIFAR10 = "cifar10-32-random"
PEERS = {
    "f32": ["torch-eager", "torch-compile", "openvino", "onnxruntime"],
    # ONNX Runtime's CPU provider has no bf16 convolution.
    "bf16": ["torch-eager", "torch-compile", "openvino"],
}
# Share of the processors that others may use before a result is no figure to quote: runtimes that
# spin while they wait for a thread lose many times more by it than those that sleep.
QUIET = 0.1
# Steps that a worker makes before it answers.
WARM_UPS = 2
# Relative error (Frobenius norm) against f64, above which a runtime does not answer our question.
AGREES = {"f32": 1e-4, "bf16": 1e-1}


def setup() -> None:
    """Makes the environment, or completes it."""
    if not ENVIRONMENT.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    pip = [ENVIRONMENT / "bin" / "python", "-m", "pip", "install", "-r", HERE / "requirements.txt"]
    subprocess.run(pip, check=True)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setup", action="store_true", help="make the environment, and end")
    parser.add_argument("--understudy", type=Path, help="this binary, instead of building one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=3, help="of each runtime's turn, about")
    parser.add_argument("--models", nargs="+", default=[CIFAR10, TEACHER], choices=[CIFAR10, TEACHER])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--peers", nargs="+", help="only these runtimes")
    parser.add_argument("--precisions", nargs="+", default=["f32", "bf16"], choices=["f32", "bf16"])
    parser.add_argument("--bf16", choices=["auto", "always", "never"], default="auto",
                        help="auto: where the processor multiplies bf16 itself")
    parser.add_argument("--steps", type=int, default=50, help="of the whole images; 0 leaves them out")
    parser.add_argument("--training", action="store_true", help="training steps, and nothing else")
    parser.add_argument("--example", type=Path, help="the training example, instead of building it")
    parser.add_argument("--out", type=Path, help="default: results/DATE.json")
    return parser.parse_args()


class Worker:
    """One peer in its own process; see worker.py for what it is told."""

    def __init__(self, runtime: str, threads: int, **options: object) -> None:
        self.runtime = runtime
        command = [sys.executable, HERE / "worker.py", "--runtime", runtime, "--threads", threads]
        for name, value in options.items():
            command += [f"--{name}", value]
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [str(one) for one in command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
        )
        self._answer()

    def ask(self, **command: object) -> dict:
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return self._answer()

    def turn(self, seconds: float) -> float:
        """Seconds of the median evaluation."""
        return statistics.median(self.ask(do="time", seconds=seconds)["seconds"])

    def end(self) -> int:
        """The most memory it has had resident."""
        peak = self.ask(do="end")["max_rss_bytes"]
        self.process.wait()
        return peak

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise SystemExit(f"{self.runtime} broke:\n{self.log.read()[-4000:]}")
        return json.loads(line)


def build(*options: str) -> Path:
    """Builds the programs, and says where they are."""
    subprocess.run(["cargo", "build", "--release", *options], cwd=ROOT, check=True)
    metadata = ["cargo", "metadata", "--format-version", "1", "--no-deps"]
    done = subprocess.run(metadata, cwd=ROOT, check=True, capture_output=True)
    return Path(json.loads(done.stdout)["target_directory"]) / "release"


def relative_error(answer, reference) -> float:
    import numpy

    return float(numpy.linalg.norm(answer - reference) / numpy.linalg.norm(reference))


def compare(arguments, folder: Path, batch: int, precision: str, peaks: Worker) -> dict:
    """All runtimes on one network at one batch size and precision."""
    import numpy
    import torch
    from machine import OtherLoad
    from networks import Network
    from ours import Server, Unsupported, bench
    from torch.utils.flop_counter import FlopCounterMode

    say(f"{folder.name}, batch {batch}, {precision}: the runtimes get ready")
    network = Network(folder).double()
    sample, *rest = inputs = network.inputs(batch)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        reference = network(sample.double(), *rest).numpy()
    gflop = counter.get_total_flops() / batch / 1e9

    errors: dict[str, float] = {}
    try:
        with Server(arguments.understudy, folder.parent, precision, arguments.threads) as server:
            errors["understudy"] = relative_error(server.evaluate(folder.name, inputs), reference)
    except Unsupported as reason:
        say(f"  understudy: {reason}")
    wanted = [one for one in PEERS[precision] if one in (arguments.peers or PEERS[precision])]
    options = {"model": folder, "batch": batch, "precision": precision}
    workers = [Worker(name, arguments.threads, **options) for name in wanted]
    with tempfile.TemporaryDirectory() as scratch:
        for worker in workers:
            path = Path(scratch) / f"{worker.runtime}.npy"
            worker.ask(do="output", path=str(path))
            errors[worker.runtime] = relative_error(numpy.load(path), reference)
    for name, error in errors.items():
        if not error <= AGREES[precision]:
            raise SystemExit(f"{name} does not answer as the f64 reference does: {error:.1e} off")

    milliseconds: dict[str, list[float]] = {name: [] for name in errors}
    peak_gflops, busy = [], []
    memory: dict[str, int] = {}
    for round_ in range(arguments.rounds):
        pids = [worker.process.pid for worker in [*workers, peaks]]
        other = OtherLoad(pids)
        peak_gflops.append(2 * 2048**3 / peaks.turn(0.5) / 1e9)
        if "understudy" in errors:
            report = bench(arguments.understudy, folder, batch, precision, arguments.threads,
                           arguments.seconds)
            milliseconds["understudy"].append(report["ms_per_image_evaluation"])
            memory["understudy"] = max(memory.get("understudy", 0), report["max_rss_bytes"])
        for worker in workers:
            seconds = worker.turn(arguments.seconds)
            milliseconds[worker.runtime].append(1e3 * seconds / batch)
        busy.append(other.share())
        shown = "  ".join(f"{name} {all_[-1]:.1f}" for name, all_ in milliseconds.items())
        say(f"  round {round_ + 1}: ms/image: {shown}; others used {busy[-1]:.0%} of the processors")
    memory |= {worker.runtime: worker.end() for worker in workers}

    peak = statistics.median(peak_gflops)
    return {
        "model": folder.name,
        "batch": batch,
        "precision": precision,
        "gflop_per_image": round(gflop, 3),
        "peak_gflops": peak_gflops,
        "other_load": [round(share, 3) for share in busy],
        "runtimes": {
            name: {
                "ms_per_image": rounds,
                "median_ms_per_image": statistics.median(rounds),
                # Round by round, because the machine's speed drifts.
                "share_of_peak": statistics.median(
                    gflop / (ms / 1e3) / peak_then for ms, peak_then in zip(rounds, peak_gflops)
                ),
                "times_ours": times(rounds, milliseconds.get("understudy")),
                "relative_error": errors[name],
                "max_rss_bytes": memory[name],
            }
            for name, rounds in milliseconds.items()
        },
    }


def whole_images(arguments, folder: Path) -> dict:
    """Images from noise to PNG: a request to the server against a diffusers pipeline."""
    from machine import OtherLoad
    from ours import Server

    batch, steps = 8, arguments.steps
    say(f"{folder.name}: whole images, {batch} at a time, {steps} DDIM steps")
    options = {"model": folder, "batch": batch, "steps": steps}
    names = ["diffusers-eager", "diffusers-compile"]
    workers = [Worker(name, arguments.threads, **options) for name in names]
    rounds: dict[str, list[float]] = {"understudy": [], **{name: [] for name in names}}
    with Server(arguments.understudy, folder.parent, "f32", arguments.threads) as server:
        server.images(folder.name, batch, steps)
        pids = [server.process.pid, *(worker.process.pid for worker in workers)]
        other = OtherLoad(pids)
        for round_ in range(arguments.rounds):
            began = time.perf_counter()
            server.images(folder.name, batch, steps)
            rounds["understudy"].append((time.perf_counter() - began) / batch)
            for worker in workers:
                rounds[worker.runtime].append(worker.turn(0) / batch)
            shown = "  ".join(f"{name} {all_[-1]:.3f}" for name, all_ in rounds.items())
            say(f"  round {round_ + 1}: seconds/image: {shown}")
        busy = other.share()
    for worker in workers:
        worker.end()
    return {
        "model": folder.name,
        "batch": batch,
        "steps": steps,
        "other_load": [round(busy, 3)],
        "runtimes": {
            name: {
                "seconds_per_image": all_,
                "median_seconds_per_image": statistics.median(all_),
                "times_ours": times(all_, rounds["understudy"]),
            }
            for name, all_ in rounds.items()
        },
    }


def training(arguments, name: str, config: dict, batch: int) -> dict:
    """Training steps of one network: forward, backward and AdamW, from the same weights and batch."""
    import numpy
    from machine import OtherLoad
    from networks import write_training

    say(f"training {name}, batch {batch}: the runtimes get ready")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_training(folder, config, batch)
        names = ["train-eager", "train-compile"]
        workers = [Worker(name, arguments.threads, model=folder) for name in names]
        rounds: dict[str, list[float]] = {"understudy": [], **{name: [] for name in names}}
        reports, busy, losses = [], [], {}
        for worker in workers:
            # The step after those that warm up: weights have moved by as many gradients.
            worker.ask(do="output", path=str(folder / "loss.npy"))
            losses[worker.runtime] = float(numpy.load(folder / "loss.npy")[0])
        for round_ in range(arguments.rounds):
            other = OtherLoad([worker.process.pid for worker in workers])
            reports.append(train_ours(arguments, folder))
            rounds["understudy"].append(reports[-1]["median_seconds"])
            for worker in workers:
                rounds[worker.runtime].append(worker.turn(arguments.seconds))
            busy.append(other.share())
            shown = "  ".join(f"{name} {all_[-1]:.3f}" for name, all_ in rounds.items())
            say(f"  round {round_ + 1}: seconds/step: {shown}; "
                f"others used {busy[-1]:.0%} of the processors")
        losses["understudy"] = reports[0]["losses"][WARM_UPS]
        for runtime, loss in losses.items():
            if not abs(loss - losses["train-eager"]) <= AGREES["f32"] * losses["train-eager"]:
                raise SystemExit(f"{runtime} does not train as PyTorch does: losses {losses}")
        memory = {worker.runtime: worker.end() for worker in workers}
    memory["understudy"] = max(report["max_rss_bytes"] for report in reports)
    return {
        "network": name,
        "parameters": reports[0]["parameters"],
        "batch": batch,
        "other_load": [round(share, 3) for share in busy],
        "losses": losses,
        "ours": reports[-1],
        "runtimes": {
            name: {
                "seconds_per_step": all_,
                "median_seconds_per_step": statistics.median(all_),
                "times_ours": times(all_, rounds["understudy"]),
                "max_rss_bytes": memory[name],
            }
            for name, all_ in rounds.items()
        },
    }


def train_ours(arguments, folder: Path) -> dict:
    environment = os.environ | {"RAYON_NUM_THREADS": str(arguments.threads)}
    command = [arguments.example, folder, folder / "batch.safetensors", arguments.seconds]
    command = [str(one) for one in command]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def times(theirs: list[float], ours: list[float] | None) -> float | None:
    """How many times our time they take: the median over the rounds."""
    if not ours:
        return None
    return statistics.median(their / our for their, our in zip(theirs, ours))


def table(report: dict) -> str:
    """For people; a ratio above 1 means that Understudy is faster."""
    lines = []
    for result in report["evaluations"]:
        peak = statistics.median(result["peak_gflops"])
        lines += [
            "",
            f"{result['model']}, batch {result['batch']}, {result['precision']} "
            f"({result['gflop_per_image']:.2f} GFLOP per image; a 2048³ product: {peak:.0f} GFLOP/s; "
            f"others used {statistics.median(result['other_load']):.0%} of the processors)",
            f"  {'':16}{'ms/image':>10}{'× ours':>9}{'of peak':>9}{'error':>10}{'MiB':>7}",
        ]
        for name, one in by_speed(result["runtimes"], "median_ms_per_image"):
            lines.append(
                f"  {name:16}{one['median_ms_per_image']:10.2f}{ratio(one['times_ours'])}"
                f"{one['share_of_peak']:9.0%}{one['relative_error']:10.0e}"
                f"{one['max_rss_bytes'] / 2**20:7.0f}"
            )
        lines.append(f"  against the fastest peer: {against_fastest(result['runtimes'])}")
        lines += warning(result)
    for result in report["images"]:
        lines += ["", f"{result['model']}, whole images, {result['batch']} at a time, "
                  f"{result['steps']} DDIM steps", f"  {'':18}{'s/image':>10}{'× ours':>9}"]
        for name, one in by_speed(result["runtimes"], "median_seconds_per_image"):
            lines.append(f"  {name:18}{one['median_seconds_per_image']:10.4f}{ratio(one['times_ours'])}")
        lines += warning(result)
    for result in report["training"]:
        lines += ["", f"training {result['network']}, {result['parameters'] / 1e6:.1f} million "
                  f"parameters, batch {result['batch']}",
                  f"  {'':18}{'s/step':>10}{'× ours':>9}{'MiB':>7}"]
        for name, one in by_speed(result["runtimes"], "median_seconds_per_step"):
            lines.append(f"  {name:18}{one['median_seconds_per_step']:10.3f}"
                         f"{ratio(one['times_ours'])}{one['max_rss_bytes'] / 2**20:7.0f}")
        lines.append(f"  against the fastest peer: {against_fastest(result['runtimes'])}")
        lines += warning(result)
    return "\n".join(lines)


def warning(result: dict) -> list[str]:
    if statistics.median(result["other_load"]) <= QUIET:
        return []
    return ["  NOT A FIGURE TO QUOTE: the machine was busy with other things"]


def by_speed(runtimes: dict, key: str) -> list:
    return sorted(runtimes.items(), key=lambda item: item[1][key])


def ratio(value: float | None) -> str:
    return f"{value:9.2f}" if value is not None else f"{'–':>9}"


def against_fastest(runtimes: dict) -> str:
    peers = {name: one["times_ours"] for name, one in runtimes.items() if name != "understudy"}
    if not peers or None in peers.values():
        return "nothing to compare"
    fastest = min(peers, key=peers.get)
    return f"{peers[fastest]:.2f} × as fast ({fastest})"


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = [line.split("==")[0] for line in (HERE / "requirements.txt").read_text().split()]
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return {"understudy": commit} | {name: version(name) for name in names}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def evaluations(arguments, precisions: list[str]) -> dict:
    """All evaluations and whole images that were asked for."""
    from machine import native
    from networks import write_random_cifar10

    report: dict = {}
    with tempfile.TemporaryDirectory() as scratch:
        models = Path(scratch)
        if CIFAR10 in arguments.models:
            write_random_cifar10(models / CIFAR10)
        if TEACHER in arguments.models:
            shutil.copytree(ROOT / "models" / "zoo" / TEACHER, models / TEACHER)

        peaks = {name: Worker("product", arguments.threads, precision=name)
                 for name in ["f32", "bf16", "int8"] if native(name) or name in precisions}
        report["products_gflops"] = {
            name: 2 * 2048**3 / worker.turn(1) / 1e9 for name, worker in peaks.items()
        }
        report["evaluations"] = [
            compare(arguments, models / name, batch, precision, peaks[precision])
            for name in arguments.models
            for precision in precisions
            for batch in arguments.batches
        ]
        images = arguments.steps > 0 and TEACHER in arguments.models
        report["images"] = [whole_images(arguments, models / TEACHER)] if images else []
        for worker in peaks.values():
            worker.end()
    return report


def main() -> None:
    arguments = read_arguments()
    if arguments.setup:
        return setup()
    own = ENVIRONMENT / "bin" / "python"
    if own.exists() and Path(sys.prefix) != ENVIRONMENT:
        os.execv(own, [str(own), *sys.argv])
    if arguments.training:
        options = ["-p", "understudy-distill", "--example", "training"]
        arguments.example = arguments.example or build(*options) / "examples" / "training"
    else:
        arguments.understudy = arguments.understudy or build() / "understudy"

    import torch
    from machine import describe, native
    from networks import STUDENT_14M, half_width

    torch.set_num_threads(arguments.threads)
    bf16 = arguments.bf16 == "always" or (arguments.bf16 == "auto" and native("bf16"))
    precisions = [one for one in arguments.precisions if one == "f32" or bf16]
    today = datetime.date.today().isoformat()
    report: dict = {
        "date": today,
        "machine": describe(),
        "versions": versions(),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
    }
    if arguments.training:
        student = half_width(ROOT / "models" / "zoo" / TEACHER)
        report |= {"products_gflops": {}, "evaluations": [], "images": [], "training": [
            training(arguments, "DKDM's 14M student", STUDENT_14M, 32),
            training(arguments, "the bundled teacher at half its width", student, 64),
        ]}
    else:
        report |= evaluations(arguments, precisions) | {"training": []}

    machine, products = report["machine"], report["products_gflops"]
    print(f"{machine['processor']}, {arguments.threads} threads, {' '.join(machine['flags'])}")
    shown = ", ".join(f"{name} {speed:.0f}" for name, speed in products.items())
    print(f"2048³ products in PyTorch, Gop/s: {shown}")
    print(table(report))
    kind = "-training" if arguments.training else ""
    out = arguments.out or HERE / "results" / f"{today}{kind}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    say(f"\nwritten to {out}")


if __name__ == "__main__":
    main()
