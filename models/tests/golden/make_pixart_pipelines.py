"""Writes the golden files of the whole pipelines in models/tests/pixart_pipeline.rs: diffusers' PixArtAlphaPipeline and
PixArtSigmaPipeline, small and with random weights, and what they make.

    pip install torch diffusers transformers safetensors compel
    OMP_NUM_THREADS=1 python models/tests/golden/make_pixart_pipelines.py

`pixart_pipeline/NAME/` is a folder as diffusers saves it, but for the tokenizer, which is `t5_tokenizer/`; `alpha` has the
class that PixArt-α was published with. `pixart_pipeline/NAME.safetensors` holds `latents` (standard normal, where each
begins), `denoised` (as the pipeline hands them to its decoder, before scaling) and `images` (in [-1, 1], not clamped), all f32;
the metadata holds `request` and the versions. Run make_t5.py first.
"""

import json
import shutil
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline
from diffusers import PixArtTransformer2DModel
from make_pipelines import drawn, levels
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel, T5Tokenizer

HERE = Path(__file__).parent
OUT = HERE / "pixart_pipeline"
VERSIONS = dict(torch=torch.__version__, diffusers=diffusers.__version__, transformers=transformers.__version__)


@torch.no_grad()
def pipeline(name: str, kind, arguments: dict, request: dict, size: tuple) -> None:
    tokenizer = T5Tokenizer.from_pretrained(HERE / "t5_tokenizer")
    text = T5EncoderModel(T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        is_encoder_decoder=False, use_cache=False,
    ))
    transformer = drawn(PixArtTransformer2DModel(**(dict(
        num_attention_heads=3, attention_head_dim=4, cross_attention_dim=12, caption_channels=16, num_layers=2, patch_size=2,
    ) | arguments)), 2)
    # Answers that a trained network could give: latents stay about as large as they begin.
    transformer.proj_out.weight.data *= 0.125
    vae = drawn(AutoencoderKL(
        **levels(2), block_out_channels=(4, 8), norm_num_groups=4, latent_channels=4, sample_size=16, layers_per_block=1,
        scaling_factor=0.18215,
    ), 3)
    scheduler = DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    pipe = kind(tokenizer, drawn(text, 1), vae, transformer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    folder = OUT / name
    pipe.save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")
    height, width = size
    factor = pipe.vae_scale_factor
    latents = torch.randn(2, 4, height, width, generator=torch.Generator().manual_seed(4))
    denoised = pipe(
        [request["prompt"]] * 2, negative_prompt=request["negative_prompt"], guidance_scale=request["guidance_scale"],
        num_inference_steps=request["steps"], latents=latents, output_type="latent", clean_caption=False,
        use_resolution_binning=False, height=factor * height, width=factor * width,
        max_sequence_length=request["tokens"],
    ).images
    images = vae.decode(denoised / vae.config.scaling_factor).sample
    tensors = dict(latents=latents, denoised=denoised, images=images)
    save_file(
        {key: value.float().contiguous() for key, value in tensors.items()}, OUT / f"{name}.safetensors",
        VERSIONS | dict(request=json.dumps(request)))
    print(name, [(key, tuple(value.shape), float(value.std())) for key, value in tensors.items()])


if __name__ == "__main__":
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    request = dict(
        prompt="  A small cactus with a Happy Face ", negative_prompt="word", guidance_scale=4.5, steps=5, scheduler="dpm++",
        tokens=60,
    )
    pipeline("alpha", PixArtAlphaPipeline, dict(sample_size=128), request, (8, 12))
    for file in ["model_index.json", "transformer/config.json"]:
        path = OUT / "alpha" / file
        path.write_text(path.read_text().replace("PixArtTransformer2DModel", "Transformer2DModel"))
    sigma = dict(sample_size=8, interpolation_scale=2, use_additional_conditions=False)
    pipeline("sigma", PixArtSigmaPipeline, sigma, request | dict(negative_prompt=""), (8, 8))
