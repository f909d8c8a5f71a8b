"""Writes the golden files of models/tests/sd3.rs: what small diffusers SD3Transformer2DModels answer.

    pip install torch diffusers safetensors
    python models/tests/golden/make_sd3s.py

Weights (the table of places among them), noisy samples, prompts and pooled texts are by `formula.py` and not in the files;
everything but the sines and cosines of the time and the mean squares of heads, which diffusers has in f32, is worked out in
f64. Each file holds `output` for three rows at other times; some hold `gradient_x` and `gradients`, as those of make_pixarts.py
do, of all weights but the table of places, which diffusers does not train; one holds that `table` as diffusers makes it. The
metadata holds `config`, `size`, `tokens`, `timesteps`, and the versions of torch and diffusers.
"""

import json
from pathlib import Path

import diffusers
import torch
from diffusers import SD3Transformer2DModel
from formula import formula, gradients, weight
from safetensors.torch import save_file

OUT = Path(__file__).parent / "sd3"
X_SEED, PROMPT_SEED, POOLED_SEED = range(1_000_001, 1_000_004)

SMALL = dict(
    sample_size=16, in_channels=4, out_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=3,
    joint_attention_dim=20, caption_projection_dim=24, pooled_projection_dim=14, pos_embed_max_size=12,
)

# The arguments, the size of the samples, and the tokens of prompts.
CASES = {
    # As Stable Diffusion 3.
    "sd3": (SMALL, (16, 16), 7),
    # As Stable Diffusion 3.5 Medium: queries and keys by their root mean square, a second attention in the first blocks.
    "sd3_5": (SMALL | dict(qk_norm="rms_norm", dual_attention_layers=[0, 1]), (16, 16), 5),
    # As Stable Diffusion 3.5 Large.
    "sd3_5_large": (SMALL | dict(qk_norm="rms_norm", num_layers=2), (16, 16), 5),
    # At sizes whose places are cut out of the table's, an odd number of them on one side.
    "another_size": (SMALL | dict(qk_norm="rms_norm", dual_attention_layers=[0]), (10, 20), 9),
    # Patches of one pixel, heads of an odd number of channels, a second attention in the only block.
    "everything_else": (
        dict(
            sample_size=6, patch_size=1, in_channels=3, out_channels=None, num_layers=1, attention_head_dim=5,
            num_attention_heads=4, joint_attention_dim=9, caption_projection_dim=20, pooled_projection_dim=6,
            pos_embed_max_size=9, dual_attention_layers=[0, 7], qk_norm="rms_norm",
        ),
        (6, 6),
        3,
    ),
}
GRADIENTS = ("sd3", "sd3_5", "everything_else")


@torch.no_grad()
def filled(model: torch.nn.Module) -> torch.nn.Module:
    """The model with every weight by the formula, its seed being the place of its name among all, in f64."""
    weights = dict(model.named_parameters()) | {"pos_embed.pos_embed": model.pos_embed.pos_embed}
    assert sorted(weights) == sorted(model.state_dict())
    for seed, name in enumerate(sorted(weights)):
        weights[name].copy_(weight(name, weights[name].shape, seed))
    return model.double().eval()


def write(name: str, arguments: dict, size: tuple, tokens: int) -> None:
    model = SD3Transformer2DModel(**arguments)
    table = model.pos_embed.pos_embed.clone()
    config = filled(model).config
    x = formula((3, config.in_channels, *size), 1.7, X_SEED).double().requires_grad_()
    prompt = formula((3, tokens, config.joint_attention_dim), 1.7, PROMPT_SEED).double()
    pooled = formula((3, config.pooled_projection_dim), 1.7, POOLED_SEED).double()
    timesteps = [1, 500, 999]
    output = model(x, prompt, pooled, torch.tensor(timesteps)).sample
    tensors = {"output": output.detach().float()}
    if name == "sd3":
        tensors["table"] = table
    if name in GRADIENTS:
        tensors |= gradients(model, output, x)
    metadata = {
        "config": model.to_json_string(),
        "size": json.dumps(size),
        "tokens": json.dumps(tokens),
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
