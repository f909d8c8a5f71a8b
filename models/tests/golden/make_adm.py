"""Writes the golden files of models/tests/adm.rs: small guided-diffusion networks and their answers.

    git clone https://github.com/openai/guided-diffusion
    pip install torch numpy safetensors
    python models/tests/golden/make_adm.py --guided-diffusion guided-diffusion

Each case is three files: `NAME.json` (the flags), `NAME.pt` (the state dict, f16, exactly what the
network computed with as f32) and `NAME.safetensors` (`x`, `timesteps`, perhaps `labels`, `output`;
metadata: the versions). The network is guided-diffusion's own `UNetModel`; every weight is random,
those that start at zero included.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

OUT = Path(__file__).parent / "adm"

BASE = dict(
    image_size=8,
    num_channels=32,
    channel_mult="1,1",
    num_res_blocks=1,
    attention_resolutions="4",
    num_head_channels=16,
    use_scale_shift_norm=True,
    diffusion_steps=1000,
    noise_schedule="linear",
)
CASES = {
    # As the 64x64 ImageNet model.
    "new_order": BASE
    | dict(
        resblock_updown=True,
        use_new_attention_order=True,
        learn_sigma=True,
        class_cond=True,
        num_classes=7,
        noise_schedule="cosine",
    ),
    # As the 256x256 models.
    "legacy_order": BASE | dict(resblock_updown=True, learn_sigma=True, attention_resolutions="8,4"),
    # As improved-diffusion's: a number of heads, convolutions that resample, widths that differ.
    "improved": BASE
    | dict(
        channel_mult="1,2",
        num_head_channels=-1,
        num_heads=4,
        learn_sigma=True,
        dropout=0.3,
        diffusion_steps=4000,
        noise_schedule="cosine",
        rescale_timesteps=True,
    ),
    "one_level": BASE
    | dict(use_scale_shift_norm=False, channel_mult="1", attention_resolutions="8", in_channels=1),
    "middle_attention": BASE
    | dict(
        use_scale_shift_norm=False,
        attention_resolutions="",
        predict_xstart=True,
        sigma_small=True,
        num_head_channels=32,
        use_new_attention_order=True,
    ),
}


def build(flags: dict, unet) -> torch.nn.Module:
    """guided_diffusion.script_util.create_model, which has no in_channels and num_classes."""
    sides = [int(side) for side in flags["attention_resolutions"].split(",") if side]
    channels = flags.get("in_channels", 3)
    return unet.UNetModel(
        image_size=flags["image_size"],
        in_channels=channels,
        model_channels=flags["num_channels"],
        out_channels=2 * channels if flags.get("learn_sigma") else channels,
        num_res_blocks=flags["num_res_blocks"],
        attention_resolutions=tuple(flags["image_size"] // side for side in sides),
        dropout=flags.get("dropout", 0.0),
        channel_mult=tuple(int(mult) for mult in flags["channel_mult"].split(",")),
        num_classes=flags["num_classes"] if flags.get("class_cond") else None,
        num_heads=flags.get("num_heads", 4),
        num_head_channels=flags["num_head_channels"],
        use_scale_shift_norm=flags["use_scale_shift_norm"],
        resblock_updown=flags.get("resblock_updown", False),
        use_new_attention_order=flags.get("use_new_attention_order", False),
    )


@torch.no_grad()
def write(name: str, flags: dict, unet) -> None:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    model = build(flags, unet).eval()
    norms = {
        f"{path}.weight" for path, module in model.named_modules() if isinstance(module, torch.nn.GroupNorm)
    }
    for key, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if key in norms:
            value = 1 + 0.3 * noise
        elif weight.ndim == 1:
            value = 0.3 * noise
        else:
            value = noise / weight[0].numel() ** 0.5
        weight.data = value.half().float()
    x = torch.randn(3, model.in_channels, 8, 8, generator=generator)
    timesteps = torch.tensor([0, 417, 999])
    labels = torch.tensor([6, 0, 3]) if flags.get("class_cond") else None
    output = model(x, timesteps, labels)

    torch.save({key: value.half() for key, value in model.state_dict().items()}, OUT / f"{name}.pt")
    (OUT / f"{name}.json").write_text(json.dumps(flags, indent=2) + "\n")
    tensors = {"x": x, "timesteps": timesteps.float(), "output": output}
    if labels is not None:
        tensors["labels"] = labels.float()
    save_file(tensors, OUT / f"{name}.safetensors", {"torch": torch.__version__})
    print(f"{name}: |output| up to {output.abs().max():.3g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--guided-diffusion", required=True, help="a checkout of openai/guided-diffusion")
    sys.path.insert(0, parser.parse_args().guided_diffusion)
    from guided_diffusion import unet

    OUT.mkdir(exist_ok=True)
    for name, flags in CASES.items():
        write(name, flags, unet)
