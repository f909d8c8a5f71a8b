"""Writes pipeline/stable_diffusion_xl/ and what diffusers draws with it, for models/tests/pipeline.rs and tests/generate.rs: a small
StableDiffusionXLPipeline with random weights, two text encoders, a pooled text and sizes.

    pip install torch diffusers transformers safetensors
    OMP_NUM_THREADS=1 python models/tests/golden/make_xl_pipeline.py

`stable_diffusion_xl.safetensors` is guided away from a prompt, `unsaid_negative_xl.safetensors` from nothing (zeros), `another_size_xl.safetensors`,
too, at 16×24 pixels. Tensors as make_pipelines.py has them; latents are standard normal, before they are scaled to the first noise level.
"""

import shutil

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from make_pipelines import HERE, OUT, drawn, levels, write
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


def encoder(tokenizer, width: int, **more) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=24, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **more,
    )


@torch.no_grad()
def main():
    files = [str(HERE / "tokenizer" / name) for name in ("vocab.json", "merges.txt")]
    first = CLIPTokenizer(*files, model_max_length=24)
    # As published: the second tokenizer fills up with another token.
    second = CLIPTokenizer(*files, model_max_length=24, pad_token="!")
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=40,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=[1, 2], norm_num_groups=4, use_linear_projection=True, transformer_layers_per_block=[1, 2],
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=60,
    )
    vae = AutoencoderKL(
        **levels(2), block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=16, scaling_factor=0.13025, force_upcast=True)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1,
        interpolation_type="linear",
    )
    one = drawn(CLIPTextModel(encoder(first, 16)), 21)
    two = drawn(CLIPTextModelWithProjection(encoder(second, 24, projection_dim=12, hidden_act="gelu")), 22)
    unet = drawn(unet, 23)
    # Answers that a trained network could give: latents stay about as large as they begin.
    unet.conv_out.weight.data *= 0.25
    pipe = StableDiffusionXLPipeline(drawn(vae, 24), one, two, first, second, unet, scheduler, add_watermarker=False)
    folder = OUT / "stable_diffusion_xl"
    shutil.rmtree(folder, ignore_errors=True)
    pipe.save_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    for name, negative, height, width in [
        ("stable_diffusion_xl", "a cat", 16, 16), ("unsaid_negative_xl", None, 16, 16), ("another_size_xl", None, 16, 24),
    ]:
        request = dict(prompt="red apple, noto style", negative_prompt=negative, guidance_scale=4.0, steps=6, scheduler="euler")
        latents = torch.randn(2, 4, height // 2, width // 2, generator=torch.Generator().manual_seed(25))
        denoised = pipe(
            [request["prompt"]] * 2, negative_prompt=negative and [negative] * 2, guidance_scale=4.0, num_inference_steps=6,
            latents=latents, output_type="latent", height=height, width=width,
        ).images
        images = pipe.vae.decode(denoised / pipe.vae.config.scaling_factor).sample
        write(name, request, latents, denoised, images)


if __name__ == "__main__":
    main()
