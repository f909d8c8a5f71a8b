#!/usr/bin/env python3
"""How diffusers samples a student of few steps: `few_steps.json`.

    python distill/tests/golden/make_few_steps.py     needs torch and diffusers

For each number of evaluations: DDIMScheduler's timesteps and every latent of a trajectory whose network answers
v = 0.6 x − 0.3 sin(t), whatever x is. The configuration is what `Student::of_few_steps` writes for a teacher on the
cosine schedule of 1000 timesteps; the test compares that, too.
"""

import json
import math
from pathlib import Path

import diffusers
import torch
from diffusers import DDIMScheduler

CONFIG = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "trailing",
}


def trajectory(evaluations):
    scheduler = DDIMScheduler.from_config(CONFIG)
    scheduler.set_timesteps(evaluations)
    x = torch.tensor([-1.5, -0.2, 0.0, 0.7, 2.1], dtype=torch.float64)
    latents = [x.tolist()]
    for t in scheduler.timesteps:
        v = 0.6 * x - 0.3 * math.sin(t)
        x = scheduler.step(v, t, x).prev_sample
        latents.append(x.tolist())
    return {"evaluations": evaluations, "timesteps": scheduler.timesteps.tolist(), "latents": latents}


def main():
    golden = {
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "config": CONFIG,
        "trajectories": [trajectory(evaluations) for evaluations in (1, 2, 4, 5, 8)],
    }
    Path(__file__).with_name("few_steps.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
