"""Writes the golden files of models/tests/pixart.rs: what small diffusers PixArtTransformer2DModels answer.

    pip install torch diffusers safetensors
    python models/tests/golden/make_pixarts.py

Weights, noisy samples and prompts are by `formula.py` and not in the files; everything but the sines and cosines of numbers,
and places, which diffusers has in f32, is worked out in f64. Each file holds `output` for three rows at other times and with
prompts of other lengths: what follows a prompt's last token are numbers as well, and diffusers is told by a mask that they are
none. Some hold `gradient_x` and `gradients`, as those of make_condition_unets.py do. The metadata holds `config`, `size`,
`factor` (pixels of an image for one of a latent's), `lengths` of the prompts, of which the first has all tokens, `timesteps`,
and the versions of torch and diffusers.
"""

import json
from pathlib import Path

import diffusers
import torch
from diffusers import PixArtTransformer2DModel
from formula import fill, formula, gradients
from safetensors.torch import save_file

OUT = Path(__file__).parent / "pixart"
X_SEED, PROMPT_SEED = 1_000_001, 1_000_002
# Pixels of an image for one of a latent's: eight, but for one network.
FACTORS = {"alpha_1024": 4}

SMALL = dict(
    num_attention_heads=3, attention_head_dim=8, cross_attention_dim=24, caption_channels=20, num_layers=2, sample_size=16,
)

# The arguments, the size of the samples, and the lengths of prompts.
CASES = {
    # As PixArt-α for images of 256 and 512 pixels.
    "alpha": (SMALL, (16, 16), [7, 3, 1]),
    # As PixArt-α for 1024 pixels, which is told the size of images since its sample_size is 128; at another size.
    "alpha_1024": (SMALL | dict(sample_size=128), (16, 12), [9, 9, 2]),
    # The same at a size of its own.
    "told_size": (SMALL | dict(use_additional_conditions=True), (16, 16), [4, 1, 3]),
    # As PixArt-Σ.
    "sigma": (
        SMALL | dict(sample_size=16, interpolation_scale=2, use_additional_conditions=False, num_layers=3),
        (16, 16),
        [11, 5, 8],
    ),
    "sigma_at_another_size": (SMALL | dict(interpolation_scale=1.5), (8, 24), [5, 4, 2]),
    # A prompt as wide as cross-attention takes it, patches of one pixel, no variance.
    "everything_else": (
        dict(
            num_attention_heads=2, attention_head_dim=10, cross_attention_dim=14, num_layers=1, sample_size=6, patch_size=1,
            in_channels=3, out_channels=None, attention_bias=False, activation_fn="gelu", norm_eps=1e-3, dropout=0.1,
            upcast_attention=True, norm_num_groups=16, num_embeds_ada_norm=7,
        ),
        (6, 6),
        [3, 2, 1],
    ),
}
GRADIENTS = ("alpha", "told_size", "everything_else")


def write(name: str, arguments: dict, size: tuple, lengths: list) -> None:
    model = fill(PixArtTransformer2DModel(**arguments))
    config = model.config
    rows, tokens, (height, width) = len(lengths), max(lengths), size
    x = formula((rows, config.in_channels, height, width), 1.7, X_SEED).double().requires_grad_()
    wide = config.caption_channels or config.cross_attention_dim
    prompt = formula((rows, tokens, wide), 1.7, PROMPT_SEED).double()
    mask = torch.tensor([[1] * length + [0] * (tokens - length) for length in lengths])
    factor, told = FACTORS.get(name, 8), None
    if model.use_additional_conditions:
        told = {
            "resolution": torch.tensor([[factor * height, factor * width]] * rows, dtype=torch.float32),
            "aspect_ratio": torch.tensor([[height / width]] * rows, dtype=torch.float32),
        }
    timesteps = [1, 500, 999]
    output = model(x, prompt, torch.tensor(timesteps), told, encoder_attention_mask=mask).sample
    tensors = {"output": output.detach().float()}
    if name in GRADIENTS:
        tensors |= gradients(model, output, x)
    metadata = {
        "config": model.to_json_string(),
        "size": json.dumps(size),
        "factor": json.dumps(factor),
        "lengths": json.dumps(lengths),
        "timesteps": json.dumps(timesteps),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    save_file({key: value.contiguous() for key, value in tensors.items()}, OUT / f"{name}.safetensors", metadata)
    print(f"{name}: |output| up to {output.abs().max():.3g}")


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for name, case in CASES.items():
        write(name, *case)
