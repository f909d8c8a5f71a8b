"""Records what the schedulers do that latent and few-step models ship with, for models/tests/samplers.rs.

    python models/tests/golden/make_schedulers.py

writes schedulers.safetensors (trajectories) and schedulers.json (which configuration made which) beside itself. Needs
torch, diffusers, numpy, scipy and safetensors. Network, start and noise are those of make_samplers.py, whose file is read.

Two corrections of diffusers' own numbers, both of what f32 leaves to chance: steps are taken in f64 over the
schedulers' f32 tables, and DPM-Solver++ cuts exponential and beta sigmas' timesteps to whole ones after adding 0.001, so that
the last training timestep is not 998 where the logarithm of the largest sigma was rounded up.
"""

import json

import diffusers
import numpy as np
import scipy
import torch
from diffusers.schedulers import (
    scheduling_dpmsolver_multistep,
    scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete,
    scheduling_flow_match_euler_discrete,
    scheduling_lcm,
    scheduling_tcd,
)
from make_samplers import HERE, DoubleTorch, network
from safetensors.torch import load_file, save_file

CLASSES = {
    "pndm": diffusers.PNDMScheduler,
    "euler-ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "lcm": diffusers.LCMScheduler,
    "tcd": diffusers.TCDScheduler,
    "flow-euler": diffusers.FlowMatchEulerDiscreteScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
}
SIGMA_BASED = ("euler", "heun", "euler-ancestral")
CASTING = (
    scheduling_dpmsolver_multistep,
    scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete,
    scheduling_flow_match_euler_discrete,
)
NOISY = (
    scheduling_euler_ancestral_discrete,
    scheduling_flow_match_euler_discrete,
    scheduling_lcm,
    scheduling_tcd,
)

RECORDED = load_file(HERE / "samplers.safetensors")
START, NOISE = RECORDED["start"], RECORDED["noise"]


def take(kind, config, steps, eta):
    """A whole trajectory: the timesteps, and the latents before and after each, variance-preserving but for flow's."""
    scheduler = CLASSES[kind].from_config(config)
    if kind == "dpm++":
        exact = scheduler._sigma_to_t
        karras = config.get("use_karras_sigmas") and config.get("beta_schedule") != "squaredcos_cap_v2"
        scheduler._sigma_to_t = lambda *args: exact(*args) if karras else np.floor(exact(*args) + 1e-3)
    scheduler.set_timesteps(steps)
    # Coincident timesteps are no reason to begin at the second of them.
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()
    for module in CASTING:
        module.torch = DoubleTorch()
    timesteps = scheduler.timesteps
    train = scheduler.config.num_train_timesteps
    scale = [1.0] * (len(timesteps) + 1)
    if kind in SIGMA_BASED:
        # The end is left as it is: what the scheduler gives there is the sample.
        scale = [(1 + float(s) ** 2) ** 0.5 for s in scheduler.sigmas[: len(timesteps)]] + [1.0]
    x = START.double() * scale[0]
    latents = [START.double()]
    for i, t in enumerate(timesteps):
        noise = NOISE[i % len(NOISE)].double()
        for module in NOISY:
            module.randn_tensor = lambda *_, **__: noise
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        answer = network(scaled, t, train, None)
        extra = {"eta": eta} if kind == "tcd" else {}
        x = scheduler.step(answer, t, x, **extra).prev_sample
        latents.append(x / scale[i + 1])
    for module in CASTING:
        module.torch = torch
    return timesteps.double(), torch.stack(latents).float()


STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SPACINGS = ("leading", "trailing", "linspace")
BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")


def cases():
    """(sampler, configuration, steps, eta)."""
    prk = {"skip_prk_steps": True}
    for steps in (1, 2, 3, 4, 5, 11):
        yield "pndm", {**prk, **STABLE_DIFFUSION, "steps_offset": 1, "set_alpha_to_one": False}, steps, 0.0
        for spacing in SPACINGS:
            yield "pndm", {**prk, "timestep_spacing": spacing}, steps, 0.0
    for prediction in ("epsilon", "v_prediction"):
        for betas in BETAS:
            for to_one in (True, False):
                config = {"prediction_type": prediction, "beta_schedule": betas, "set_alpha_to_one": to_one}
                yield "pndm", {**prk, **config}, 6, 0.0
    yield "pndm", {**prk, "trained_betas": [0.01, 0.05, 0.1, 0.2, 0.3, 0.4], "num_train_timesteps": 6}, 6, 0.0
    yield "pndm", {**prk, **STABLE_DIFFUSION, "steps_offset": 1}, 50, 0.0

    for spacing in SPACINGS:
        for steps in (1, 2, 4, 7):
            # SD-Turbo is trailing.
            yield "euler-ancestral", {**STABLE_DIFFUSION, "timestep_spacing": spacing}, steps, 0.0
    for prediction in ("epsilon", "v_prediction"):
        for betas in BETAS:
            yield "euler-ancestral", {"prediction_type": prediction, "beta_schedule": betas}, 5, 0.0
            yield "euler-ancestral", {
                "prediction_type": prediction,
                "beta_schedule": betas,
                "rescale_betas_zero_snr": True,
                "timestep_spacing": "trailing",
            }, 5, 0.0
    yield "euler-ancestral", {"timestep_spacing": "leading", "steps_offset": 1}, 5, 0.0

    for kind, etas in (("lcm", (0.0,)), ("tcd", (0.0, 0.3, 1.0))):
        for eta in etas:
            for steps in (1, 2, 4, 7):
                yield kind, {}, steps, eta
            for prediction in ("epsilon", "sample", "v_prediction"):
                for betas in BETAS:
                    yield kind, {"prediction_type": prediction, "beta_schedule": betas}, 4, eta
            yield kind, {"original_inference_steps": 100}, 7, eta
            yield kind, {"num_train_timesteps": 130, "original_inference_steps": 20}, 7, eta
            for prediction in ("sample", "v_prediction"):
                yield kind, {"rescale_betas_zero_snr": True, "prediction_type": prediction}, 4, eta
            for field in (
                {"timestep_scaling": 0.01},
                {"clip_sample": True},
                {"clip_sample": True, "clip_sample_range": 2.5},
                {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.7},
            ):
                yield kind, field, 4, eta

    for kind in ("dpm++", "euler", "heun"):
        for respacing in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
            for steps in (1, 2, 6):
                for spacing in SPACINGS:
                    config = {**STABLE_DIFFUSION, "timestep_spacing": spacing, respacing: True}
                    yield kind, config, steps, 0.0
            for prediction in ("epsilon", "v_prediction"):
                for betas in BETAS:
                    config = {"prediction_type": prediction, "beta_schedule": betas, respacing: True}
                    yield kind, config, 6, 0.0
            yield kind, {"sigma_min": 0.1, "sigma_max": 20.0, **STABLE_DIFFUSION, respacing: True}, 6, 0.0
            if kind != "heun":
                config = {"final_sigmas_type": "sigma_min", **STABLE_DIFFUSION, respacing: True}
                yield kind, config, 6, 0.0
                yield kind, {**config, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, 5, 0.0
        if kind == "dpm++":
            yield kind, {**STABLE_DIFFUSION, "use_karras_sigmas": True, "solver_type": "heun"}, 16, 0.0
            yield kind, {**STABLE_DIFFUSION, "use_karras_sigmas": True, "steps_offset": 1}, 20, 0.0

    for shift in (1.0, 3.0, 0.7):
        for steps in (1, 2, 5, 28):
            yield "flow-euler", {"shift": shift}, steps, 0.0
        for field in (
            {"use_karras_sigmas": True},
            {"use_exponential_sigmas": True},
            {"use_beta_sigmas": True},
            {"shift_terminal": 0.1},
            {"stochastic_sampling": True},
            {"num_train_timesteps": 20},
        ):
            yield "flow-euler", {"shift": shift, **field}, 6, 0.0


def main():
    tensors, listed = {}, []
    for kind, config, steps, eta in cases():
        id = f"s{len(listed):03}"
        timesteps, latents = take(kind, config, steps, eta)
        assert torch.isfinite(latents).all(), (kind, config, steps)
        tensors[f"{id}/timesteps"] = timesteps
        # Long trajectories keep their ends.
        tensors[f"{id}/x"] = latents if len(timesteps) <= 8 else latents[-3:].clone()
        listed.append({"id": id, "kind": kind, "config": config, "steps": steps, "eta": eta})
    versions = {name: module.__version__ for name, module in (
        ("torch", torch), ("diffusers", diffusers), ("numpy", np), ("scipy", scipy))}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, HERE / "schedulers.safetensors", metadata=versions)
    lines = ",\n".join(json.dumps(case) for case in listed)
    (HERE / "schedulers.json").write_text(
        f'{{"versions": {json.dumps(versions)},\n"cases": [\n{lines}\n]}}\n'
    )
    print(len(listed), "trajectories")


if __name__ == "__main__":
    main()
