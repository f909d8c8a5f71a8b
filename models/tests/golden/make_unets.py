"""Writes the golden files of models/tests/unet.rs: small diffusers UNet2DModels and their answers.

    pip install torch diffusers safetensors
    python models/tests/golden/make_unets.py

Each file holds one network: `weights/NAME` (f16, exactly what the network computed with, as f32),
`x`, `timesteps`, perhaps `condition`, and `output` (f32); its metadata holds `config` (config.json as
diffusers writes it) and the versions of torch and diffusers. Every weight is random, norms and biases
included, so that nothing is hidden by its initial zero or one.
"""

import json
from pathlib import Path

import diffusers
import torch
from diffusers import UNet2DModel
from safetensors.torch import save_file

OUT = Path(__file__).parent / "unet"

PLAIN = dict(
    sample_size=8,
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=4,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
RESNET = dict(
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    up_block_types=("ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    block_out_channels=(8, 8, 16),
    downsample_type="resnet",
    upsample_type="resnet",
)

# What each adds to PLAIN, and the timesteps it is asked for.
CASES = {
    # As google/ddpm-cifar10-32: asymmetric padding, one head, frequencies up to 1/10000.
    "ddpm": (
        dict(
            downsample_padding=0,
            attention_head_dim=None,
            freq_shift=1,
            flip_sin_to_cos=False,
            norm_eps=1e-6,
            layers_per_block=2,
        ),
        [0, 500, 999],
    ),
    # As Dhariwal & Nichol: scale-shift norms, resampling residual blocks, classes, learned variance.
    "adm": (
        RESNET
        | dict(
            resnet_time_scale_shift="scale_shift",
            attn_norm_num_groups=8,
            num_class_embeds=5,
            out_channels=6,
        ),
        [1, 250, 999],
    ),
    "scale_shift_without_mid_norm": (dict(resnet_time_scale_shift="scale_shift"), [3, 700, 12]),
    "resnet_default_shift": (RESNET, [0.5, 333.25, 998.75]),
    "fourier": (
        dict(time_embedding_type="fourier", mid_block_scale_factor=1.4142135, act_fn="mish"),
        [0.01, 1.5, 50.0],
    ),
    "learned": (
        dict(time_embedding_type="learned", num_train_timesteps=20, act_fn="gelu", in_channels=1, out_channels=1),
        [0, 7, 19],
    ),
    "learned_class_timestep": (
        dict(time_embedding_type="learned", num_train_timesteps=20, class_embed_type="timestep"),
        [2, 7, 19],
    ),
    "class_timestep": (dict(class_embed_type="timestep", act_fn="relu", num_class_embeds=3), [5, 50, 500]),
    "class_identity": (dict(class_embed_type="identity", time_embedding_dim=24), [5, 50, 500]),
    "no_mid": (dict(mid_block_type=None, center_input_sample=True), [10, 20, 30]),
    "mid_without_attention": (
        dict(add_attention=False, attn_norm_num_groups=2, block_out_channels=(10, 20), norm_num_groups=5,
             attention_head_dim=5, freq_shift=0.5, act_fn="swish"),
        [10, 20, 30],
    ),
    "rectangle_null_types": (
        dict(
            sample_size=(8, 4),
            downsample_type=None,
            upsample_type=None,
            down_block_types=("AttnDownBlock2D", "UNetResDownBlock2D"),
            up_block_types=("UNetResUpBlock2D", "AttnUpBlock2D"),
        ),
        [10, 20, 999],
    ),
    # Types that do not mirror each other, and a resampler of each kind.
    "mixed": (
        dict(
            down_block_types=("AttnDownBlock2D", "ResnetDownsampleBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            block_out_channels=(8, 12, 16),
            upsample_type="resnet",
            dropout=0.1,
        ),
        [10, 20, 999],
    ),
    "one_level": (
        dict(
            block_out_channels=(9,),
            norm_num_groups=3,
            attention_head_dim=3,
            down_block_types=("AttnDownBlock2D",),
            up_block_types=("UpBlock2D",),
        ),
        [10, 20, 999],
    ),
}


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name == "time_proj.weight" and model.config.time_embedding_type == "fourier":
            value = 2 * noise
        elif weight.ndim == 1 and "norm" in name and name.endswith("weight"):
            value = 1 + 0.3 * noise
        elif weight.ndim == 1:
            value = 0.3 * noise
        else:
            value = noise / weight[0].numel() ** 0.5
        weight.data = value.half().float()


def condition(model: UNet2DModel, generator: torch.Generator) -> torch.Tensor | None:
    config = model.config
    if config.class_embed_type == "identity":
        return torch.randn(3, config.time_embedding_dim, generator=generator)
    if config.class_embed_type == "timestep":
        return torch.tensor([4, 0, 11])
    if config.num_class_embeds is not None:
        return torch.tensor([4, 0, 2])
    return None


@torch.no_grad()
def write(name: str, changes: dict, timesteps: list) -> None:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    torch.manual_seed(0)
    model = UNet2DModel(**(PLAIN | changes)).eval()
    randomise(model, generator)
    size = model.config.sample_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    x = torch.randn(3, model.config.in_channels, height, width, generator=generator)
    labels = condition(model, generator)
    output = model(x, torch.tensor(timesteps), class_labels=labels).sample

    tensors = {f"weights/{key}": value.half() for key, value in model.state_dict().items()}
    tensors |= {"x": x, "timesteps": torch.tensor(timesteps, dtype=torch.float32), "output": output}
    if labels is not None:
        tensors["condition"] = labels.to(torch.float32)
    config = json.loads(model.to_json_string())
    metadata = {
        "config": json.dumps(config),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    save_file({key: value.contiguous() for key, value in tensors.items()}, OUT / f"{name}.safetensors", metadata)
    print(f"{name}: |output| up to {output.abs().max():.3g}")


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for name, (changes, timesteps) in CASES.items():
        write(name, changes, timesteps)
