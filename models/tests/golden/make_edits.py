"""Writes pipeline/edits.safetensors, for tests/generate.rs: images that begin with another, by diffusers.

    pip install torch diffusers transformers safetensors pillow
    OMP_NUM_THREADS=1 python models/tests/golden/make_edits.py

Of the small pipeline in pipeline/stable_diffusion (make_pipelines.py), with several schedulers. Noise is that of Understudy's seeds:
Philox-4x32-10 (Salmon et al. 2011) and Box-Muller, here once more. Tensors: `picture` u8 `[16, 16, 3]`, `NAME.images` f32 `[2, 3, 16, 16]`
in [-1, 1] of seeds 5 and 6, `masked.NAME.images` where `mask` f32 `[8, 8]` is 0 in a part that stays, and the PNG of a turned picture with its upright pixels (`turned` u8 bytes, `upright` u8 `[H, W, 3]`), and one
that is scaled (`large` u8 `[40, 56, 3]`, `scaled` u8 `[16, 24, 3]`), as Pillow makes them.
"""

import io
import json
import math
from pathlib import Path

import diffusers
import numpy as np
import PIL
import torch
import transformers
from diffusers import (DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler,
                       StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline)
from diffusers.models.autoencoders import vae
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as img2img
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_inpaint as inpaint
from PIL import Image, ImageOps
from safetensors.torch import save_file

HERE = Path(__file__).parent
SEEDS = [5, 6]
REQUEST = dict(prompt="red apple, noto style", negative_prompt="a cat", guidance_scale=4.0, steps=9, strength=0.6)
VARIATION = (1 << 63) - 1
WORD = 0xFFFFFFFF


def philox(counter, key):
    for _ in range(10):
        left, right = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(right >> 32) ^ counter[1] ^ key[0], right & WORD, (left >> 32) ^ counter[3] ^ key[1], left & WORD]
        key = [(key[0] + 0x9E3779B9) & WORD, (key[1] + 0xBB67AE85) & WORD]
    return counter


def normal(seed, step, shape):
    values = []
    for block in range(math.ceil(math.prod(shape) / 4)):
        words = philox([block & WORD, block >> 32, step & WORD, step >> 32], [seed & WORD, seed >> 32])
        for a, b in [words[:2], words[2:]]:
            radius, angle = math.sqrt(-2 * math.log((a + 0.5) / 2**32)), 2 * math.pi * (b + 0.5) / 2**32
            values += [radius * math.cos(angle), radius * math.sin(angle)]
    return torch.tensor(values[: math.prod(shape)], dtype=torch.float64).float().reshape(shape)


def noise(step):
    """A source of noise in place of diffusers'."""

    def drawn(shape, *_, **__):
        return torch.stack([normal(seed, step, tuple(shape)[1:]) for seed in SEEDS])

    return drawn


@torch.no_grad()
def main():
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(
        HERE / "pipeline" / "stable_diffusion", safety_checker=None, feature_extractor=None)
    pipe.set_progress_bar_config(disable=True)
    vae.randn_tensor, img2img.randn_tensor = noise(VARIATION), noise(0)
    generator = np.random.default_rng(7)
    picture = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    tensors = {"picture": torch.from_numpy(picture)}
    config = pipe.scheduler.config
    schedulers = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler, "heun": HeunDiscreteScheduler}
    for name, scheduler in schedulers.items():
        pipe.scheduler = scheduler.from_config(config)
        images = pipe(
            [REQUEST["prompt"]] * 2, image=[Image.fromarray(picture)] * 2, strength=REQUEST["strength"],
            num_inference_steps=REQUEST["steps"], guidance_scale=REQUEST["guidance_scale"],
            negative_prompt=[REQUEST["negative_prompt"]] * 2, output_type="latent",
        ).images
        tensors[f"{name}.images"] = pipe.vae.decode(images / pipe.vae.config.scaling_factor).sample.contiguous()
        print(name, tensors[f"{name}.images"].std())

    # The same where a part of the picture stays: 1 where a latent is drawn.
    masking = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    masking.set_progress_bar_config(disable=True)
    inpaint.randn_tensor = noise(0)
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[4:14, 6:] = 255
    tensors["mask"] = torch.from_numpy(mask[::2, ::2] / 255).float()
    for name in ["ddim", "dpm++", "heun"]:
        masking.scheduler = schedulers[name].from_config(config)
        images = masking(
            [REQUEST["prompt"]] * 2, image=[Image.fromarray(picture)] * 2, mask_image=[Image.fromarray(mask)] * 2,
            strength=REQUEST["strength"], num_inference_steps=REQUEST["steps"], guidance_scale=REQUEST["guidance_scale"],
            negative_prompt=[REQUEST["negative_prompt"]] * 2, height=16, width=16, output_type="latent",
        ).images
        tensors[f"masked.{name}.images"] = pipe.vae.decode(images / pipe.vae.config.scaling_factor).sample.contiguous()

    # Upright by its EXIF data, which asks for a quarter of a turn; transparency is left out.
    lying = Image.fromarray(generator.integers(0, 256, (10, 14, 4), dtype=np.uint8), "RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    lying.save(file, "PNG", exif=exif)
    tensors["turned"] = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue()))).convert("RGB")
    tensors["upright"] = torch.from_numpy(np.array(upright))

    waves = np.add.outer(np.arange(40), np.arange(56))[..., None] * np.array([3, 5, 7])
    large = ((np.sin(waves / 40) + 1) * 127).astype(np.uint8)
    tensors["large"] = torch.from_numpy(large)
    tensors["scaled"] = torch.from_numpy(np.array(Image.fromarray(large).resize((24, 16), Image.LANCZOS)))
    versions = dict(torch=torch.__version__, diffusers=diffusers.__version__, transformers=transformers.__version__, pillow=PIL.__version__)
    save_file(tensors, HERE / "pipeline" / "edits.safetensors", versions | dict(request=json.dumps(REQUEST)))


if __name__ == "__main__":
    main()
