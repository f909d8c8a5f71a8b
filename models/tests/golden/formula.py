"""Numbers by a formula, for golden files that hold no weights: the same in Python and in tests/common/mod.rs."""

import numpy as np
import torch

DIRECTION_SEED, WEIGHT_SEED = 1_000_004, 1_000_005


def formula(shape, scale: float, seed: int) -> torch.Tensor:
    """f32 numbers from -scale to scale, the same for the same seed: a linear congruential generator's upper 24 bits."""
    state = (seed * 2_654_435_761 + 1) & 0xFFFFFFFF
    count = int(np.prod(shape))
    upper = np.empty(count, dtype=np.float32)
    for i in range(count):
        state = (state * 1_664_525 + 1_013_904_223) & 0xFFFFFFFF
        upper[i] = state >> 8
    values = (upper / np.float32(1 << 23) - np.float32(1)) * np.float32(scale)
    return torch.from_numpy(values.reshape(tuple(shape)))


def weight(name: str, shape, seed: int) -> torch.Tensor:
    """Around 1 for the weights of norms, within 0.3 for other vectors, of a deviation of 1/sqrt(fan in) for products."""
    if len(shape) == 1:
        values = formula(shape, 0.3, seed)
        return values + 1 if "norm" in name and name.endswith("weight") else values
    return formula(shape, float(np.sqrt(np.float32(3) / np.float32(np.prod(shape[1:])))), seed)


@torch.no_grad()
def fill(model: torch.nn.Module) -> torch.nn.Module:
    """The model with every weight by the formula, its seed being the place of its name among all, in f64."""
    parameters = dict(model.named_parameters())
    for seed, name in enumerate(sorted(parameters)):
        parameters[name].copy_(weight(name, parameters[name].shape, seed))
    return model.double().eval()


def gradients(model: torch.nn.Module, output: torch.Tensor, x: torch.Tensor) -> dict:
    """Of `output` along a direction: by the noisy samples, and of each trained weight, in the order of names, the norm and what lies along another."""
    (output * formula(output.shape, 1.0, DIRECTION_SEED).double()).sum().backward()
    pairs = []
    for _, parameter in sorted(model.named_parameters(), key=lambda named: named[0]):
        gradient = parameter.grad
        direction = formula(gradient.shape, 1.0, WEIGHT_SEED).double()
        pairs.append(torch.stack([gradient.norm(), (gradient * direction).sum()]))
    return {"gradient_x": x.grad.float(), "gradients": torch.stack(pairs)}
