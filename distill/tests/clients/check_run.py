"""Reads a finished run with the real packages: TensorBoard its events, diffusers its model.

    pip install tensorboard diffusers torch numpy
    python distill/tests/clients/check_run.py OUT [--steps 20]

Fails unless TensorBoard's scalars are those of `log.jsonl`, and unless diffusers loads the model strictly
and samples finite images of its size.
"""

import argparse
import json
import sys
from pathlib import Path


def events(training):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(training), size_guidance={"scalars": 0}).Reload()
    log = {}
    for line in (training / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        log[record["step"]] = record
    tags = {"loss/total": "loss", "loss/simple": "simple", "learning_rate": "learning_rate",
            "gradient_norm": "gradient_norm"}
    points = 0
    for tag, field in tags.items():
        scalars = accumulator.Scalars(tag)
        steps = [scalar.step for scalar in scalars]
        assert steps == sorted(set(steps)), f"{tag}: steps {steps}"
        expected = [step for step in log if step == 1 or step % 10 == 0]
        assert steps == expected, f"{tag}: TensorBoard has {steps}, the log {expected}"
        for scalar in scalars:
            value = log[scalar.step][field]
            assert abs(scalar.value - value) <= 1e-6 * abs(value), f"{tag} {scalar.step}"
            points += 1
    print(f"TensorBoard reads {points} points of {len(tags)} tags, as in log.jsonl")


def model(out, steps):
    import torch
    from diffusers import DDIMScheduler, UNet2DModel

    unet = UNet2DModel.from_pretrained(out, subfolder="unet")
    scheduler = DDIMScheduler.from_pretrained(out, subfolder="scheduler")
    scheduler.set_timesteps(steps)
    classes = unet.config.num_class_embeds
    labels = torch.arange(4) % classes if classes else None
    x = torch.randn(
        4, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size,
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        for t in scheduler.timesteps:
            answer = unet(x, t, class_labels=labels).sample[:, : x.shape[1]]
            x = scheduler.step(answer, t, x).prev_sample
    assert torch.isfinite(x).all() and x.abs().max() <= 1.01, x.abs().max()
    print(f"diffusers loads {out} and samples {tuple(x.shape)} in {steps} steps")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    events(arguments.out / "training")
    model(arguments.out, arguments.steps)
    sys.exit(0)


main()
