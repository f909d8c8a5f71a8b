"""Writes the golden files of the whole pipelines in models/tests/sd3_pipeline.rs and tests/generate.rs: diffusers'
StableDiffusion3Pipeline, small and with random weights, and what it makes.

    pip install torch diffusers transformers safetensors
    OMP_NUM_THREADS=1 python models/tests/golden/make_sd3_pipelines.py

`sd3_pipeline/NAME/` is a folder as diffusers saves it, but for the tokenizers: those of CLIP's are `tokenizer/`, as which the
second one fills prompts up with another token, T5's is `t5_tokenizer/`. `three` has all three text encoders, `two` no third one,
and the parts of Stable Diffusion 3.5 Medium. `sd3_pipeline/NAME.safetensors` holds `latents` (standard normal, where each begins),
`states` and `pooled` (of prompt and negative prompt), `denoised` (as the pipeline hands them to its decoder, before scaling) and
`images` (in [-1, 1], not clamped), all f32; the metadata holds `request` and the versions. Run make_t5.py first.
"""

import json
import shutil
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from make_pipelines import drawn, levels
from make_xl_pipeline import encoder
from safetensors.torch import save_file
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

HERE = Path(__file__).parent
OUT = HERE / "sd3_pipeline"
VERSIONS = dict(torch=torch.__version__, diffusers=diffusers.__version__, transformers=transformers.__version__)


@torch.no_grad()
def pipeline(name: str, arguments: dict, request: dict, size: tuple, third: bool) -> None:
    files = [str(HERE / "tokenizer" / part) for part in ("vocab.json", "merges.txt")]
    tokenizers = [CLIPTokenizer(*files, model_max_length=24), CLIPTokenizer(*files, model_max_length=24, pad_token="!")]
    one = CLIPTextModelWithProjection(encoder(tokenizers[0], 8, projection_dim=6))
    two = CLIPTextModelWithProjection(encoder(tokenizers[1], 12, projection_dim=10, hidden_act="gelu"))
    t5_tokenizer = T5Tokenizer.from_pretrained(HERE / "t5_tokenizer") if third else None
    t5 = third and drawn(T5EncoderModel(T5Config(
        vocab_size=len(t5_tokenizer), d_model=28, d_kv=6, d_ff=20, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu",
        is_encoder_decoder=False, use_cache=False,
    )), 33)
    # T5 does not scale its scores; its queries are that much smaller.
    for key, weight in (t5.named_parameters() if third else []):
        if key.endswith(".q.weight"):
            weight.data = (weight / t5.config.d_kv**0.5).half().float()
    transformer = drawn(SD3Transformer2DModel(**(dict(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=4, num_attention_heads=3,
        joint_attention_dim=28, caption_projection_dim=12, pooled_projection_dim=16, pos_embed_max_size=8,
    ) | arguments)), 34)
    # Scores that are not so sharp that the last bit of a sine shows: torch rounds two of the time's 128 frequencies otherwise.
    for key, weight in transformer.named_parameters():
        if key.endswith(("to_q.weight", "add_q_proj.weight")):
            weight.data *= 0.25
    # Answers that a trained network could give: latents stay about as large as they begin.
    transformer.proj_out.weight.data *= 0.25
    # As published: shifted latents of 16 channels, and no products around them.
    vae = drawn(AutoencoderKL(
        **levels(2), block_out_channels=(4, 8), norm_num_groups=4, latent_channels=16, sample_size=16, layers_per_block=1,
        scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False, force_upcast=True,
    ), 35)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=drawn(one, 31), tokenizer=tokenizers[0],
        text_encoder_2=drawn(two, 32), tokenizer_2=tokenizers[1], text_encoder_3=t5 or None, tokenizer_3=t5_tokenizer,
    )
    pipe.set_progress_bar_config(disable=True)
    folder = OUT / name
    pipe.save_pretrained(folder)
    for tokenizer in folder.glob("tokenizer*"):
        # What is said of the token that fills prompts up stays.
        for file in tokenizer.iterdir():
            if tokenizer.name == "tokenizer_3" or file.name != "tokenizer_config.json":
                file.unlink()
        if not any(tokenizer.iterdir()):
            tokenizer.rmdir()
    height, width = size
    factor = pipe.vae_scale_factor
    latents = torch.randn(2, 16, height, width, generator=torch.Generator().manual_seed(36))
    prompt, negative = request["prompt"], request["negative_prompt"]
    states = pipe.encode_prompt(prompt, prompt, prompt, negative_prompt=negative)
    denoised = pipe(
        [prompt] * 2, negative_prompt=[negative] * 2, guidance_scale=request["guidance_scale"],
        num_inference_steps=request["steps"], latents=latents, output_type="latent", height=factor * height, width=factor * width,
    ).images
    images = vae.decode(denoised / vae.config.scaling_factor + vae.config.shift_factor).sample
    tensors = dict(
        latents=latents, states=torch.cat(states[:2]), pooled=torch.cat(states[2:]), denoised=denoised, images=images)
    save_file(
        {key: value.float().contiguous() for key, value in tensors.items()}, OUT / f"{name}.safetensors",
        VERSIONS | dict(request=json.dumps(request)))
    print(name, [(key, tuple(value.shape), float(value.std())) for key, value in tensors.items()])


if __name__ == "__main__":
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    request = dict(prompt="Red apple, noto Style", negative_prompt="a cat", guidance_scale=4.5, steps=5, scheduler="flow-euler")
    pipeline("three", {}, request, (8, 8), third=True)
    medium = dict(qk_norm="rms_norm", dual_attention_layers=[0])
    pipeline("two", medium, request | dict(negative_prompt=""), (8, 12), third=False)
