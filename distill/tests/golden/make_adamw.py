"""Writes adamw.safetensors: twelve steps of PyTorch's AdamW with clipping and a linear warm-up.

    pip install torch numpy safetensors
    python distill/tests/golden/make_adamw.py

Per step s (from 0): `gradient.s.NAME`, `norm.s` before clipping, and `weight.s.NAME` after it; `weight.NAME`
is where they begin. The learning rate is 1e-2 after 5 steps of warm-up, weight decay 0.1, clip norm 2.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

OUT = Path(__file__).parent / "adamw.safetensors"
SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 1, 3, 3)}


def main():
    generator = torch.Generator().manual_seed(1)
    draw = lambda shape: torch.randn(shape, generator=generator)
    weights = {name: torch.nn.Parameter(draw(shape)) for name, shape in SHAPES.items()}
    out = {f"weight.{name}": weight.detach().clone() for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2, weight_decay=0.1)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 5, 1.0))
    for step in range(12):
        for name, weight in weights.items():
            # Now and then too large, so that clipping has something to do, and now and then small.
            weight.grad = draw(weight.shape) * (0.1 if step % 3 == 0 else 1.0)
            out[f"gradient.{step}.{name}"] = weight.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), 2.0)
        out[f"norm.{step}"] = norm.reshape(1)
        optimizer.step()
        warm_up.step()
        for name, weight in weights.items():
            out[f"weight.{step}.{name}"] = weight.detach().clone()
    save_file(out, OUT, metadata={"torch": torch.__version__})


main()
