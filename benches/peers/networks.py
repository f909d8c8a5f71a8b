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
