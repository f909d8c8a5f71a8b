#!/usr/bin/env python3
"""Autoguidance (Karras et al. 2024, arXiv 2406.02507): a teacher guided away from a worse network of the same kind.

    python3 distill/experiments/autoguidance.py W WORSE --data FOLDER     draws and scores images

At every step the answer is T + (W - 1)(T - B), of the bundled teacher T and of B, the model folder WORSE; W = 1 is the
teacher alone. Needs torch, diffusers and numpy, so that what the server and its samplers do has no part in it, and the
`understudy` binary (`cargo build --release`) for the scores. What is there already is not drawn again.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path

import diffusers
import numpy
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = HERE / "results"
ZOO = ROOT / "models/zoo"
TEACHER = ZOO / "fashion-mnist-teacher"
SAMPLES = 2_000
STEPS = 20
BATCH = 100


def network(folder):
    return diffusers.UNet2DModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()


@torch.no_grad()
def draw(weight, worse, seed):
    """Images of all classes in turn, u8 [SAMPLES, 32, 32]."""
    teacher, bad = network(TEACHER), network(worse)
    scheduler = diffusers.DDIMScheduler.from_pretrained(TEACHER / "scheduler")
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(seed)
    images = []
    for begin in range(0, SAMPLES, BATCH):
        x = torch.randn(BATCH, 1, 32, 32, generator=generator)
        classes = torch.arange(begin, begin + BATCH) % 10
        for t in scheduler.timesteps:
            answer = teacher(x, t, classes).sample
            if weight != 1:
                answer = answer + (weight - 1) * (answer - bad(x, t, classes).sample)
            x = scheduler.step(answer, t, x).prev_sample
        pixels = (x[:, 0].clamp(-1, 1) * 127.5 + 127.5).round()
        images.append(pixels.to(torch.uint8).numpy())
    return numpy.concatenate(images)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weight", type=float)
    parser.add_argument("worse", type=Path, help="a model folder, or the name of a bundled model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, required=True, help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--work", type=Path, default=ROOT / "target/experiments", help="where images are kept")
    parser.add_argument("--understudy", default=str(ROOT / "target/release/understudy"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    worse = options.worse if options.worse.is_dir() else ZOO / options.worse
    name = f"autoguidance-{options.weight:g}-{worse.name}-{options.seed}"
    options.work.mkdir(parents=True, exist_ok=True)
    images, scores = (options.work / f"{name}{end}" for end in (".npz", ".json"))
    if not images.exists():
        temporary = images.with_suffix(".part.npz")
        numpy.savez(temporary, draw(options.weight, worse, options.seed)[..., None])
        temporary.rename(images)
    if not scores.exists():
        reference = options.data / "train-images-idx3-ubyte.gz"
        flags = {"samples": images, "reference": reference, "threads": options.threads, "out": scores}
        command = [options.understudy, "evaluate", *(f"--{key}={value}" for key, value in flags.items())]
        subprocess.run(command, env={**os.environ, "UNDERSTUDY_MODELS": str(ZOO)}, check=True)
    result = {
        "row": "autoguidance",
        "weight": options.weight,
        "worse": worse.name,
        "seed": options.seed,
        "num_inference_steps": STEPS,
        "samples": SAMPLES,
        "scores": json.loads(scores.read_text())["scores"],
    }
    RESULTS.mkdir(exist_ok=True)
    temporary = RESULTS / f".{name}.json"
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    temporary.rename(RESULTS / f"{name}.json")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
