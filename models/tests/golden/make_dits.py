"""Writes the golden files of models/tests/dit.rs: small diffusers DiTTransformer2DModels, their answers
and their gradients.

    pip install torch diffusers safetensors
    python models/tests/golden/make_dits.py

Each file holds one network: `weights/NAME` (f16, exactly what the network computed with, as f32), `x`,
`timesteps`, perhaps `condition`, and `output`; then `direction`, and the gradients of
`sum(output · direction)` for the input, `gradient/x`, and for the weights, `gradients/NAME` (all f32).
Both come from f64, so that what is compared is the other side's rounding alone. The metadata holds
`config` (config.json as diffusers writes it) and the versions of torch and diffusers. Every weight is
random: as they are made, the norms' scales and gates would hide all the rest.
"""

import json
from pathlib import Path

import diffusers
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import save_file

OUT = Path(__file__).parent / "dit"

PLAIN = dict(
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=3,
    num_layers=2,
    sample_size=8,
    patch_size=2,
    num_embeds_ada_norm=4,
)

# What each adds to PLAIN, the timesteps it is asked for, and the classes.
CASES = {
    # Class 4 is the one that means "none".
    "classes": ({}, [0, 500, 999], [0, 3, 4]),
    "learned_variance": (dict(out_channels=6), [1, 250, 999], [1, 4, 2]),
    # Tables of one row; fractional times.
    "unconditional": (dict(num_embeds_ada_norm=0, in_channels=1), [0.5, 333.25, 998.75], None),
    "unbiased_exact_gelu": (
        dict(attention_bias=False, activation_fn="gelu", norm_eps=1e-3, upcast_attention=True,
             dropout=0.1, norm_num_groups=16),
        [3, 700, 12],
        [2, 2, 0],
    ),
    # Heads and widths that fill no vector, an odd number of patches.
    "odd": (
        dict(num_attention_heads=3, attention_head_dim=12, sample_size=9, patch_size=3),
        [10, 20, 999],
        [0, 1, 2],
    ),
    "one_patch": (dict(patch_size=8, num_layers=1), [10, 20, 999], [0, 1, 2]),
}


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        value = 0.3 * noise if weight.ndim == 1 else noise / weight[0].numel() ** 0.5
        weight.data = value.half().float()


def write(name: str, changes: dict, timesteps: list, labels: list | None) -> None:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    torch.manual_seed(0)
    model = DiTTransformer2DModel(**(PLAIN | changes)).eval()
    randomise(model, generator)
    config = model.config
    shape = (3, config.in_channels, config.sample_size, config.sample_size)
    x = torch.randn(shape, generator=generator)
    classes = torch.tensor([0, 0, 0] if labels is None else labels)
    weights = {key: value.clone() for key, value in model.named_parameters()}

    model.double()
    # In diffusers positions and times are worked out as f32 whatever the network's type.
    wide = x.double().requires_grad_()
    output = model(wide, torch.tensor(timesteps), class_labels=classes).sample
    direction = torch.randn(output.shape, generator=generator)
    (output * direction.double()).sum().backward()

    tensors = {f"weights/{key}": value.detach().half() for key, value in weights.items()}
    tensors |= {f"gradients/{key}": value.grad.float() for key, value in model.named_parameters()}
    tensors |= {"x": x, "timesteps": torch.tensor(timesteps, dtype=torch.float32)}
    tensors |= {"output": output.detach().float(), "direction": direction, "gradient/x": wide.grad.float()}
    if labels is not None:
        tensors["condition"] = classes.to(torch.float32)
    metadata = {
        "config": json.dumps(json.loads(model.to_json_string())),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    save_file(tensors, OUT / f"{name}.safetensors", metadata)
    print(f"{name}: |output| up to {output.abs().max():.3g}")


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for name, (changes, timesteps, labels) in CASES.items():
        write(name, changes, timesteps, labels)
