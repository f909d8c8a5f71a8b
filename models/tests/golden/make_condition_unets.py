"""Writes the golden files of models/tests/unet_condition.rs: what small diffusers UNet2DConditionModels answer.

    pip install torch diffusers safetensors
    python models/tests/golden/make_condition_unets.py

Weights, noisy samples, prompts and vectors are by `formula.py` and not in the files; everything but the sines and cosines
of times, which diffusers has in f32, is worked out in f64. Each file holds `output` for three rows at other times and with
other prompts; some `gradient_x` and `gradients`: of the sum of the output times a formula's direction, by the noisy sample,
and by each weight in the order of their names, for each its norm and its product with a formula's direction. The metadata
holds `config`, `tokens`, `timesteps`, perhaps `condition` or `guidance`, and the versions of torch and diffusers.
"""

import json
import sys
from pathlib import Path

import diffusers
import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel
from formula import fill, formula, gradients
from safetensors.torch import save_file

OUT = Path(__file__).parent / "unet_condition"
X_SEED, PROMPT_SEED, VECTOR_SEED = range(1_000_001, 1_000_004)
ROWS = 3

CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


def blocks(*crossing: bool) -> dict:
    """Block types whose levels, the one with the largest map first, see the prompt or do not."""
    return dict(
        down_block_types=tuple(CROSS_DOWN if c else "DownBlock2D" for c in crossing),
        up_block_types=tuple(CROSS_UP if c else "UpBlock2D" for c in reversed(crossing)),
    )


STABLE_DIFFUSION = blocks(True, True, True, False) | dict(
    sample_size=16, block_out_channels=(16, 24, 32, 32), norm_num_groups=8, cross_attention_dim=20
)
SMALL = blocks(False, True) | dict(
    sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12,
    attention_head_dim=4,
)

# The arguments, tokens of a prompt, and what else the model is told.
CASES = {
    # The shape of our own text-to-image pipeline's.
    "emoji": (
        blocks(False, True)
        | dict(
            sample_size=16, block_out_channels=(64, 128), layers_per_block=1, cross_attention_dim=128,
            attention_head_dim=4, norm_num_groups=16,
        ),
        24,
        {},
    ),
    # As Stable Diffusion 1.x: eight heads at every level.
    "stable_diffusion_1": (STABLE_DIFFUSION, 77, {}),
    # As Stable Diffusion 2.x: heads per level, matrices instead of kernels.
    "stable_diffusion_2": (
        STABLE_DIFFUSION
        | dict(attention_head_dim=[2, 3, 4, 4], use_linear_projection=True, upcast_attention=True, layers_per_block=1),
        11,
        {},
    ),
    # As SDXL, but for what it is told beside the prompt.
    "depths_per_level": (
        blocks(False, True, True)
        | dict(
            sample_size=8, block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4,
            cross_attention_dim=12, attention_head_dim=(1, 2, 4), transformer_layers_per_block=(1, 2, 3),
            use_linear_projection=True,
        ),
        9,
        {},
    ),
    # As SSD-1B.
    "nested_depths": (
        blocks(False, True)
        | dict(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=2, norm_num_groups=4, cross_attention_dim=12,
            attention_head_dim=2, transformer_layers_per_block=[0, [2, 1]],
            reverse_transformer_layers_per_block=[[1, 3, 2], 0],
        ),
        9,
        {},
    ),
    "guidance": (SMALL | dict(time_cond_proj_dim=33), 9, dict(guidance=[0.0, 6.5, 1.25])),
    "bk_base": (STABLE_DIFFUSION | dict(layers_per_block=1), 13, {}),
    "bk_small": (STABLE_DIFFUSION | dict(layers_per_block=1, mid_block_type=None), 13, {}),
    # The deepest level is left out, and what was above it has nothing to halve.
    "bk_tiny": (
        blocks(True, True, True)
        | dict(
            sample_size=8, block_out_channels=(16, 24, 32), layers_per_block=1, norm_num_groups=8,
            cross_attention_dim=20, mid_block_type=None,
        ),
        13,
        {},
    ),
    "plain_middle_only_prompt": (
        SMALL | dict(mid_block_type="UNetMidBlock2D", only_cross_attention=[False, True], mid_block_scale_factor=1.4),
        9,
        {},
    ),
    "everything_sees_only_the_prompt": (SMALL | blocks(True, True) | dict(only_cross_attention=True), 1, {}),
    "classes_and_resnets": (
        SMALL
        | dict(
            block_out_channels=(8, 8, 16),
            down_block_types=("ResnetDownsampleBlock2D", CROSS_DOWN, "DownBlock2D"),
            up_block_types=("UpBlock2D", CROSS_UP, "ResnetUpsampleBlock2D"),
            resnet_time_scale_shift="scale_shift",
            num_class_embeds=5,
        ),
        9,
        dict(condition=[4, 0, 2]),
    ),
    "class_timestep_kernels": (
        SMALL | dict(class_embed_type="timestep", act_fn="gelu", conv_in_kernel=5, conv_out_kernel=1),
        9,
        dict(condition=[4.0, 0.0, 11.0]),
    ),
    "class_projection": (
        SMALL
        | dict(
            class_embed_type="projection", projection_class_embeddings_input_dim=7, freq_shift=1, flip_sin_to_cos=False,
            downsample_padding=0, act_fn="mish",
        ),
        9,
        dict(vector=7),
    ),
    "class_simple_projection": (
        SMALL | dict(class_embed_type="simple_projection", projection_class_embeddings_input_dim=7, center_input_sample=True),
        9,
        dict(vector=7),
    ),
    "class_identity": (SMALL | dict(class_embed_type="identity", time_embedding_dim=24), 9, dict(vector=24)),
    # Lists throughout, a rectangle, learned variance.
    "lists": (
        blocks(True, True)
        | dict(
            sample_size=(8, 4), block_out_channels=(8, 12), layers_per_block=[1, 2], norm_num_groups=4,
            cross_attention_dim=[10, 10], attention_head_dim=[2, 3], in_channels=3, out_channels=6, norm_eps=1e-6,
        ),
        9,
        {},
    ),
    # As Stable Diffusion XL: a pooled text and sizes beside the prompt, transformers of several blocks.
    "stable_diffusion_xl": (
        blocks(False, True, True)
        | dict(
            sample_size=8, block_out_channels=(8, 16, 32), layers_per_block=2, norm_num_groups=8, cross_attention_dim=20,
            attention_head_dim=[1, 2, 4], transformer_layers_per_block=[1, 2, 3], use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=60,
        ),
        9,
        dict(text=12, time_ids=[[1024.0, 768.0, 0.0, 0.0, 1024.0, 768.0], [64.0, 64.0, 8.0, 4.0, 512.0, 384.0], [0.0] * 6]),
    ),
    "pooled_text": (
        SMALL
        | dict(
            addition_embed_type="text_time", addition_time_embed_dim=6, projection_class_embeddings_input_dim=41, freq_shift=1,
            flip_sin_to_cos=False, act_fn="gelu",
        ),
        9,
        dict(text=5, time_ids=[[32.0, 24.0, 1.0, 2.0, 16.0, 8.0]] * 3),
    ),
}
GRADIENTS = ("emoji", "stable_diffusion_2", "nested_depths", "guidance", "pooled_text")


def write(name: str, arguments: dict, tokens: int, told: dict) -> None:
    model = fill(UNet2DConditionModel(**arguments))
    config = model.config
    size = config.sample_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    wide = config.cross_attention_dim
    wide = wide if isinstance(wide, int) else wide[0]
    x = formula((ROWS, config.in_channels, height, width), 1.7, X_SEED).double().requires_grad_()
    prompt = formula((ROWS, tokens, wide), 1.7, PROMPT_SEED).double()
    timesteps = [1, 500, 999]
    labels = guidance = None
    if "vector" in told:
        labels = formula((ROWS, told["vector"]), 1.7, VECTOR_SEED).double()
    if "condition" in told:
        labels = torch.tensor(told["condition"])
    if "guidance" in told:
        embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
        guidance = embed(None, torch.tensor(told["guidance"]), config.time_cond_proj_dim).double()
    added = None
    if "time_ids" in told:
        texts = formula((ROWS, told["text"]), 1.7, VECTOR_SEED).double()
        added = dict(text_embeds=texts, time_ids=torch.tensor(told["time_ids"]).double())
    output = model(
        x, torch.tensor(timesteps), prompt, class_labels=labels, timestep_cond=guidance, added_cond_kwargs=added
    ).sample
    tensors = {"output": output.detach().float()}
    if name in GRADIENTS:
        tensors |= gradients(model, output, x)
    metadata = {
        "config": model.to_json_string(),
        "tokens": json.dumps(tokens),
        "timesteps": json.dumps(timesteps),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    metadata |= {key: json.dumps(value) for key, value in told.items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, OUT / f"{name}.safetensors", metadata)
    print(f"{name}: |output| up to {output.abs().max():.3g}")


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for name in sys.argv[1:] or CASES:
        write(name, *CASES[name])
