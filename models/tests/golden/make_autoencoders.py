"""Writes the golden files of models/tests/autoencoder.rs: what small diffusers autoencoders make of latents and images.

    pip install torch diffusers safetensors
    python models/tests/golden/make_autoencoders.py

Weights, latents and images are by `formula.py` and not in the files; everything is worked out in f64. Each file holds
`image` (what latents are decoded to, as pipelines do it: divided by scaling_factor, plus shift_factor), `mode` (what
images are encoded to, the other way round), perhaps `deviation`, for VQModel `codes` (the rows that latents snap to) and
`gap` (how much further the second nearest is than the nearest, in squared distance, relative to it); the metadata holds
`config` and `size`, height and width of a latent, and the versions of torch and diffusers.
"""

import json
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from formula import fill, formula
from safetensors.torch import save_file

OUT = Path(__file__).parent / "autoencoder"
LATENT_SEED, IMAGE_SEED, ROWS = 1_000_001, 1_000_002, 2


def levels(count: int) -> dict:
    return dict(down_block_types=("DownEncoderBlock2D",) * count, up_block_types=("UpDecoderBlock2D",) * count)


# The class, its arguments, and height and width of a latent.
CASES = {
    # The shape of our own text-to-image pipeline's.
    "kl_emoji": (
        AutoencoderKL,
        levels(3) | dict(block_out_channels=(16, 32, 64), norm_num_groups=8, sample_size=64, scaling_factor=0.71),
        (16, 16),
    ),
    # As Stable Diffusion's, an eighth as wide.
    "kl_stable_diffusion": (
        AutoencoderKL,
        levels(4) | dict(block_out_channels=(16, 32, 64, 64), layers_per_block=2, norm_num_groups=16, sample_size=512),
        (4, 4),
    ),
    # As those of SD3 and Flux: no convolutions of one pixel, a shift.
    "kl_shifted": (
        AutoencoderKL,
        levels(2)
        | dict(
            block_out_channels=(12, 24),
            norm_num_groups=4,
            latent_channels=16,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            mid_block_add_attention=False,
            act_fn="mish",
            sample_size=[32, 48],
        ),
        (4, 6),
    ),
    "kl_one_level": (
        AutoencoderKL,
        levels(1) | dict(block_out_channels=(8,), norm_num_groups=2, in_channels=1, out_channels=1, act_fn="gelu"),
        (8, 8),
    ),
    # As CompVis/ldm-celebahq-256, narrower.
    "vq_celebahq": (
        VQModel,
        levels(3)
        | dict(block_out_channels=(16, 32, 64), layers_per_block=2, norm_num_groups=8, num_vq_embeddings=512, act_fn="silu"),
        (8, 8),
    ),
    "vq_embed_dim": (
        VQModel,
        levels(2)
        | dict(
            block_out_channels=(8, 16),
            norm_num_groups=4,
            latent_channels=6,
            vq_embed_dim=5,
            num_vq_embeddings=70,
            scaling_factor=0.9,
            lookup_from_codebook=True,
            mid_block_add_attention=False,
            act_fn="relu",
        ),
        (6, 10),
    ),
    # As madebyollin/taesd, a quarter as wide.
    "tiny_taesd": (
        AutoencoderTiny,
        dict(encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4),
        (4, 4),
    ),
    "tiny_scaled": (
        AutoencoderTiny,
        dict(
            encoder_block_out_channels=(8,) * 3,
            decoder_block_out_channels=(20,) * 3,
            num_encoder_blocks=(1, 0, 2),
            num_decoder_blocks=(2, 0, 1),
            act_fn="gelu",
            latent_channels=5,
            scaling_factor=0.8,
            shift_factor=0.25,
            latent_magnitude=2,
        ),
        (8, 4),
    ),
}


@torch.no_grad()
def write(name: str, kind, arguments: dict, size: tuple) -> None:
    model = fill(kind(**arguments))
    config = model.config
    scale, shift = config.scaling_factor, getattr(config, "shift_factor", None) or 0.0
    channels = getattr(config, "vq_embed_dim", None) or config.latent_channels
    factor = 2 ** (len(config.get("block_out_channels")) - 1)
    latents = formula((ROWS, channels, *size), 2.0, LATENT_SEED).double()
    images = formula((ROWS, config.in_channels, *(factor * side for side in size)), 1.0, IMAGE_SEED).double()
    own = latents / scale + shift
    tensors = {"image": model.decode(own).sample}
    if kind is AutoencoderKL:
        posterior = model.encode(images).latent_dist
        tensors |= {"mode": (posterior.mode() - shift) * scale, "deviation": posterior.std * scale}
    else:
        tensors |= {"mode": (model.encode(images).latents - shift) * scale}
    tensors = {key: value.float() for key, value in tensors.items()}
    if kind is VQModel:
        _, _, (_, _, codes) = model.quantize(own)
        table = model.quantize.embedding.weight
        pixels = own.permute(0, 2, 3, 1).reshape(-1, 1, channels)
        nearest = ((pixels - table) ** 2).sum(-1).topk(2, largest=False).values
        gap = (nearest[:, 1] - nearest[:, 0]) / nearest[:, 0]
        tensors |= {"codes": codes.reshape(ROWS, *size).float(), "gap": gap.reshape(ROWS, *size).float()}
    metadata = {
        "config": model.to_json_string(),
        "size": json.dumps(size),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    save_file({key: value.contiguous() for key, value in tensors.items()}, OUT / f"{name}.safetensors", metadata)
    print(f"{name}: |image| up to {tensors['image'].abs().max():.3g}, |mode| up to {tensors['mode'].abs().max():.3g}")


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for name, (kind, arguments, size) in CASES.items():
        write(name, kind, arguments, size)
