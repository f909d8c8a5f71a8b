"""Records what the stock diffusers schedulers do, for models/tests/samplers.rs.

    python models/tests/golden/make_samplers.py

writes samplers.safetensors (tables and trajectories) and samplers.json (which configuration made
which trajectory) beside itself. Needs torch, diffusers, numpy, mpmath and safetensors.

The network is a stand-in both sides can compute: tanh(0.9·x + 0.3·t/T) of the scaled input. Noise is a
recorded sequence. Latents of Euler and Heun, x_ve, are recorded as x_vp = x_ve / sqrt(1 + sigma²).
"""

import json
from pathlib import Path

import diffusers
import mpmath
import numpy as np
import torch
from diffusers.schedulers import (
    scheduling_ddpm,
    scheduling_dpmsolver_multistep,
    scheduling_euler_discrete,
)
from safetensors.torch import save_file

HERE = Path(__file__).parent
SHAPE = (2, 2, 3, 4)
CLASSES = {
    "ddpm": diffusers.DDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
}
SIGMA_BASED = ("euler", "heun")
LEARNED = ("learned", "learned_range")

torch.manual_seed(20)
START = torch.randn(SHAPE)
NOISE = torch.randn((40, *SHAPE))


class DoubleTorch:
    """torch, whose float32 is float64: for the two classes that cast their latents down."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def network(x, t, train_timesteps, variance_type):
    mean = torch.tanh(0.9 * x + 0.3 * float(t) / train_timesteps)
    if variance_type == "learned":
        return torch.cat([mean, 0.01 * (1 + torch.tanh(x))], dim=1)
    if variance_type == "learned_range":
        return torch.cat([mean, torch.tanh(0.5 * x + 0.2)], dim=1)
    return mean


def take(kind, config, steps, eta):
    """A whole trajectory: the timesteps, and the variance-preserving latents before and after each."""
    scheduler = CLASSES[kind].from_config(config)
    scheduler.set_timesteps(steps)
    # The steps are taken in f64, over the scheduler's own f32 tables: where sigma reaches 20000 (the
    # cosine schedule) `sample + derivative * dt` in f32 would record rounding errors of 1e-3 and more
    # instead of the scheduler's arithmetic.
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()
    for module in (scheduling_dpmsolver_multistep, scheduling_euler_discrete):
        module.torch = DoubleTorch()
    timesteps = scheduler.timesteps
    variance_type = config.get("variance_type") if kind == "ddpm" else None
    train = scheduler.config.num_train_timesteps
    scale = [1.0] * (len(timesteps) + 1)
    if kind in SIGMA_BASED:
        # The end is left as it is: what the scheduler gives there is the sample.
        scale = [(1 + float(s) ** 2) ** 0.5 for s in scheduler.sigmas[: len(timesteps)]] + [1.0]
    x = START.double() * scale[0]
    latents = [START.double()]
    for i, t in enumerate(timesteps):
        noise = NOISE[i % len(NOISE)].double()
        scheduling_ddpm.randn_tensor = lambda *_, **__: noise
        answer = network(scheduler.scale_model_input(x, t), t, train, variance_type)
        extra = {"eta": eta, "variance_noise": noise} if kind == "ddim" else {}
        x = scheduler.step(answer, t, x, **extra).prev_sample
        latents.append(x / scale[i + 1])
    for module in (scheduling_dpmsolver_multistep, scheduling_euler_discrete):
        module.torch = torch
    return timesteps.double(), torch.stack(latents).float()


def cases():
    """(sampler, configuration, steps, eta): the fields that meet in one sampler are crossed."""
    predictions = ("epsilon", "sample", "v_prediction")
    spacings = ("leading", "trailing", "linspace")
    for kind in CLASSES:
        # Absent fields take the class's defaults.
        yield kind, {}, 6, 0.0
        for prediction in predictions:
            for beta_schedule in ("linear", "scaled_linear", "squaredcos_cap_v2"):
                yield kind, {
                    "prediction_type": prediction,
                    "beta_schedule": beta_schedule,
                    "beta_start": 0.00085,
                    "beta_end": 0.012,
                }, 5, 0.0
        for spacing in spacings:
            for steps in (3, 7):
                yield kind, {"timestep_spacing": spacing}, steps, 0.0
            for bound in (
                {"clip_sample": False},
                {"clip_sample": True, "clip_sample_range": 2.5},
                {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.7},
            ):
                yield kind, {"timestep_spacing": spacing, **bound}, 5, 0.0
        for spacing in ("trailing", "linspace"):
            for prediction in ("sample", "v_prediction"):
                yield kind, {
                    "rescale_betas_zero_snr": True,
                    "timestep_spacing": spacing,
                    "prediction_type": prediction,
                }, 5, 0.0
        yield kind, {"timestep_spacing": "leading", "steps_offset": 1}, 5, 0.0
        yield kind, {"num_train_timesteps": 20, "beta_end": 0.5, "timestep_spacing": "trailing"}, 19, 0.0
        yield kind, {"trained_betas": [0.01, 0.05, 0.1, 0.2, 0.3, 0.4], "num_train_timesteps": 6}, 4, 0.0
        for spacing in spacings:
            for steps in (1, 2):
                yield kind, {"timestep_spacing": spacing}, steps, 0.0
    for variance_type in ("fixed_small", "fixed_small_log", "fixed_large", *LEARNED):
        for spacing in spacings:
            yield "ddpm", {"variance_type": variance_type, "timestep_spacing": spacing}, 5, 0.0
        yield "ddpm", {
            "variance_type": variance_type,
            "timestep_spacing": "leading",
            "steps_offset": 1,
            "clip_sample": False,
            "prediction_type": "v_prediction",
        }, 5, 0.0
    yield "ddpm", {"beta_schedule": "sigmoid"}, 5, 0.0
    for prediction in predictions:
        for eta in (0.5, 1.0):
            for clip in (True, False):
                yield "ddim", {"prediction_type": prediction, "clip_sample": clip}, 5, eta
    for to_one in (True, False):
        for spacing in spacings:
            yield "ddim", {"set_alpha_to_one": to_one, "timestep_spacing": spacing, "beta_start": 0.01}, 5, 0.5
    for solver in (
        {"solver_type": "heun"},
        {"lower_order_final": False},
        {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min", "lower_order_final": False},
        {"lambda_min_clipped": -4.1},
        {"lambda_min_clipped": -4.1, "timestep_spacing": "trailing"},
        {"lambda_min_clipped": -4.1, "timestep_spacing": "leading"},
    ):
        for steps in (6, 16):
            yield "dpm++", solver, steps, 0.0
    yield "euler", {"final_sigmas_type": "sigma_min"}, 5, 0.0


def tables():
    """alpha_bar as diffusers has it (f32) and in closed form (50 digits, rounded to f64)."""
    mpmath.mp.dps = 50
    count, start, end = 1000, mpmath.mpf(0.0001), mpmath.mpf(0.02)

    def line(a, b):
        return [a + (b - a) * i / (count - 1) for i in range(count)]

    def cosine(i):
        t = mpmath.mpf(i) / count
        return mpmath.cos((t + mpmath.mpf(0.008)) / mpmath.mpf(1.008) * mpmath.pi / 2) ** 2

    betas = {
        "linear": line(start, end),
        "scaled_linear": [b**2 for b in line(mpmath.sqrt(start), mpmath.sqrt(end))],
        "squaredcos_cap_v2": [
            min(1 - cosine(i + 1) / cosine(i), mpmath.mpf(0.999)) for i in range(count)
        ],
        "sigmoid": [
            (end - start) / (1 + mpmath.exp(-z)) + start for z in line(mpmath.mpf(-6), mpmath.mpf(6))
        ],
    }
    out = {}
    # Every 20th timestep and the last ten: the ends are where schedules differ.
    rows = sorted({*range(0, count, 20), *range(count - 10, count)})
    out["table/rows"] = torch.tensor(rows)
    for name, beta in betas.items():
        for zero_snr in (False, True):
            alpha_bar, product = [], mpmath.mpf(1)
            for b in beta:
                product *= 1 - b
                alpha_bar.append(product)
            if zero_snr:
                roots = [mpmath.sqrt(a) for a in alpha_bar]
                first, last = roots[0], roots[-1]
                alpha_bar = [((r - last) * first / (first - last)) ** 2 for r in roots]
            stock = diffusers.DDPMScheduler(beta_schedule=name, rescale_betas_zero_snr=zero_snr)
            key = f"table/{name}/{'zero_snr' if zero_snr else 'plain'}"
            out[f"{key}/closed"] = torch.tensor([float(alpha_bar[i]) for i in rows], dtype=torch.float64)
            out[f"{key}/stock"] = stock.alphas_cumprod[rows].clone()
    return out


def fingerprints():
    """Of the timesteps of every step count, for the three ways of placing them: count and weighted sum."""
    out = {}
    for kind in ("ddim", "dpm++", "euler"):
        for spacing in ("leading", "trailing", "linspace"):
            scheduler = CLASSES[kind](timestep_spacing=spacing)
            sums = []
            for steps in range(1, 1001):
                scheduler.set_timesteps(steps)
                t = scheduler.timesteps.double().numpy()
                # A rounding error makes numpy's arange one longer for some counts; that −1 is left out.
                t = t[t >= 0]
                sums.append(float(np.cumsum(t)[-1] + np.dot(t, 1.0 / np.arange(1, len(t) + 1))))
            out[f"timesteps/{kind}/{spacing}"] = torch.tensor(sums, dtype=torch.float64)
    return out


def main():
    tensors = {"start": START, "noise": NOISE, **tables(), **fingerprints()}
    listed = []
    for kind, config, steps, eta in cases():
        id = f"{len(listed):03}"
        timesteps, latents = take(kind, config, steps, eta)
        assert torch.isfinite(latents).all(), (kind, config, steps)
        # Long trajectories keep their ends: each step is then judged by what follows from it.
        tensors[f"{id}/timesteps"] = timesteps
        tensors[f"{id}/x"] = latents if len(timesteps) <= 8 else latents[-3:].clone()
        listed.append({"id": id, "kind": kind, "config": config, "steps": steps, "eta": eta})
    # All 1000 steps, the last latents only.
    for kind in CLASSES:
        if kind == "dpm++":  # NaN in diffusers: its timesteps coincide
            continue
        id = f"{len(listed):03}"
        timesteps, latents = take(kind, {"timestep_spacing": "trailing"}, 1000, 0.0)
        tensors[f"{id}/x"] = latents[-1:].clone()
        listed.append(
            {"id": id, "kind": kind, "config": {"timestep_spacing": "trailing"}, "steps": 1000, "eta": 0.0}
        )
    versions = {name: module.__version__ for name, module in (
        ("torch", torch), ("diffusers", diffusers), ("numpy", np), ("mpmath", mpmath))}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, HERE / "samplers.safetensors", metadata=versions)
    lines = ",\n".join(json.dumps(case) for case in listed)
    (HERE / "samplers.json").write_text(
        f'{{"versions": {json.dumps(versions)},\n"cases": [\n{lines}\n]}}\n'
    )
    print(len(listed), "trajectories")


if __name__ == "__main__":
    main()
