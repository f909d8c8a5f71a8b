"""The networks that are measured, as diffusers model folders and as PyTorch modules."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DModel

SEED = 20260731

# The configuration of google/ddpm-cifar10-32. Its weights would make no difference to speed, and
# random ones need no download.
CIFAR10_UNET = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 0,
    "act_fn": "silu",
    "attention_head_dim": None,
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
}
CIFAR10_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "variance_type": "fixed_large",
    "clip_sample": True,
}


# The 14-million-parameter student of DKDM (Xiang et al. 2025) for CIFAR-10: an ADM U-Net (Dhariwal &
# Nichol 2021) in diffusers' terms, with learned variance.
STUDENT_14M = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 6,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": (
        "ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D",
    ),
    "up_block_types": (
        "ResnetUpsampleBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D",
    ),
    "block_out_channels": (64, 128, 128, 128),
    "layers_per_block": 3,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attention_head_dim": 32,
    "norm_num_groups": 32,
    "attn_norm_num_groups": 32,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "scale_shift",
}


def half_width(folder: Path) -> dict:
    """The configuration of a folder's U-Net with half the channels: about a quarter of the work."""
    config = dict(UNet2DModel.load_config(folder / "unet"))
    config["block_out_channels"] = [channels // 2 for channels in config["block_out_channels"]]
    config["attention_head_dim"] //= 2
    config["norm_num_groups"] //= 2
    return config


def write_training(folder: Path, config: dict, batch: int) -> None:
    """Writes a U-Net with seeded random weights, and a batch to train it on."""
    from safetensors.torch import save_file

    torch.manual_seed(SEED)
    unet = UNet2DModel.from_config(config)
    unet.save_pretrained(folder)
    size = unet.config.sample_size
    tensors = {
        "sample": torch.randn(batch, unet.config.in_channels, size, size),
        "target": torch.randn(batch, unet.config.out_channels, size, size),
        "timestep": torch.linspace(999, 1, batch).round(),
    }
    if unet.config.num_class_embeds:
        tensors["class_labels"] = (torch.arange(batch) % unet.config.num_class_embeds).int()
    save_file(tensors, folder / "batch.safetensors")


def write_random_cifar10(folder: Path) -> None:
    """Writes google/ddpm-cifar10-32's configuration with seeded random weights."""
    torch.manual_seed(SEED)
    unet = UNet2DModel(**CIFAR10_UNET)
    with torch.no_grad():
        # Fresh norms are the identity, which would hide a norm that forgets its scale or shift.
        for module in unet.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.weight.normal_(1.0, 0.1)
                module.bias.normal_(0.0, 0.1)
    unet.save_pretrained(folder / "unet")
    DDPMScheduler(**CIFAR10_SCHEDULER).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


class Network(torch.nn.Module):
    """A folder's U-Net that answers with a tensor, so that every exporter takes it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.unet = UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False).eval()

    @property
    def classes(self) -> int | None:
        return self.unet.config.num_class_embeds

    def inputs(self, batch: int) -> tuple[torch.Tensor, ...]:
        """The same for every runtime: rows that differ, at different times, of different classes."""
        generator = torch.Generator().manual_seed(SEED)
        config = self.unet.config
        size = config.sample_size
        sample = torch.randn(batch, config.in_channels, size, size, generator=generator)
        timestep = torch.linspace(999, 1, batch).round().long()
        if self.classes is None:
            return sample, timestep
        return sample, timestep, torch.arange(batch) % self.classes

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.unet(sample, timestep, class_labels, return_dict=False)[0]
