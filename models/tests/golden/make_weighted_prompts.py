"""Writes pipeline/weighted_prompt.safetensors and pipeline/long_weighted_prompt.safetensors, for tests/generate.rs: images after prompts
whose words have weights, by diffusers' community pipeline.

    pip install torch diffusers transformers safetensors
    OMP_NUM_THREADS=1 python models/tests/golden/make_weighted_prompts.py --diffusers CHECKOUT

Prompts are read by `get_weighted_text_embeddings` of examples/community/lpw_stable_diffusion.py in a checkout of diffusers, drawn by the small
pipeline in pipeline/stable_diffusion (make_pipelines.py). Tensors as make_pipelines.py has them.
"""

import argparse
import importlib.util
import json
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

OUT = Path(__file__).parent / "pipeline"
PROMPTS = {
    "weighted_prompt": "a (red:1.6) apple, ((noto)) [style]",
    "long_weighted_prompt": "a (red:1.6) apple and (green apple:0.4) on a table, noto [style] " * 2,
}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--diffusers", type=Path, required=True, help="a checkout of diffusers")
    path = parser.parse_args().diffusers / "examples/community/lpw_stable_diffusion.py"
    spec = importlib.util.spec_from_file_location("lpw", path)
    lpw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lpw)
    pipe = StableDiffusionPipeline.from_pretrained(OUT / "stable_diffusion", safety_checker=None, feature_extractor=None)
    pipe.set_progress_bar_config(disable=True)
    if not hasattr(pipe.text_encoder, "text_model"):
        # transformers from 5.6 on has no such part; its norm is the encoder's own.
        type(pipe.text_encoder).text_model = property(lambda encoder: encoder)
    for name, prompt in PROMPTS.items():
        request = dict(prompt=prompt, negative_prompt="a cat", guidance_scale=4.0, steps=6, scheduler="ddim")
        wanted, unwanted = lpw.get_weighted_text_embeddings(pipe, prompt, request["negative_prompt"], max_embeddings_multiples=4)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(13))
        denoised = pipe(
            prompt_embeds=wanted, negative_prompt_embeds=unwanted, guidance_scale=4.0, num_inference_steps=6, latents=latents,
            output_type="latent",
        ).images
        images = pipe.vae.decode(denoised / pipe.vae.config.scaling_factor).sample
        tensors = {key: value.float().contiguous() for key, value in dict(latents=latents, denoised=denoised, images=images).items()}
        versions = dict(torch=torch.__version__, diffusers=diffusers.__version__, transformers=transformers.__version__)
        save_file(tensors, OUT / f"{name}.safetensors", versions | dict(request=json.dumps(request)))
        print(name, tuple(wanted.shape), float(images.std()))


if __name__ == "__main__":
    main()
