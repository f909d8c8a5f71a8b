"""Writes the golden files of models/tests/pipeline.rs and tests/pipelines.rs: whole pipelines of diffusers, small and with
random weights, and what they make.

    pip install torch diffusers transformers safetensors compel
    OMP_NUM_THREADS=1 python models/tests/golden/make_pipelines.py

`pipeline/NAME/` is a folder as diffusers saves it: `stable_diffusion` (UNet2DConditionModel, AutoencoderKL, CLIPTextModel,
with the entries of a safety checker), `latent_diffusion` (UNet2DModel and VQModel, the layout of CompVis'
ldm-celebahq-256) and `dit` (a Transformer2DModel with AutoencoderKL). `pipeline/NAME.safetensors` holds `latents` (standard
normal, where each begins), `denoised` (as the pipeline hands them to its decoder, before scaling) and `images` (in [-1, 1],
not clamped), all f32; the metadata holds `request` and the versions.

`pipeline/long_prompt.safetensors` is of `stable_diffusion` after a prompt of three parts, and an
ordinary one to be guided away from, both as compel hands them to diffusers.

`pipeline/forms/` holds one U-Net in the forms that weights come in: `whole`, `variant` (fp16), `sharded`, `bin`,
`bin_sharded`, all of the same numbers, which f16 holds.
"""

import json
import shutil
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel, DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers import UNet2DConditionModel, UNet2DModel, VQModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

HERE = Path(__file__).parent
OUT = HERE / "pipeline"
VERSIONS = dict(torch=torch.__version__, diffusers=diffusers.__version__, transformers=transformers.__version__)


def drawn(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights that keep the size of what goes through, and are f16's numbers."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        if weight.dim() > 1:
            fan_in = weight[0].numel() if "embed" not in name or weight.dim() > 2 else 4
            values = torch.randn(weight.shape, generator=generator) / fan_in**0.5
        else:
            values = torch.randn(weight.shape, generator=generator) * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        weight.data.copy_(values.half().float())
    return model.eval()


def levels(count: int) -> dict:
    return dict(down_block_types=("DownEncoderBlock2D",) * count, up_block_types=("UpDecoderBlock2D",) * count)


def write(name: str, request: dict, latents, denoised, images):
    metadata = VERSIONS | dict(request=json.dumps(request))
    tensors = dict(latents=latents, denoised=denoised, images=images)
    save_file({key: value.float().contiguous() for key, value in tensors.items()}, OUT / f"{name}.safetensors", metadata)
    print(name, [(key, tuple(value.shape), float(value.std())) for key, value in tensors.items()])


@torch.no_grad()
def stable_diffusion():
    tokenizer = CLIPTokenizer(str(HERE / "tokenizer/vocab.json"), str(HERE / "tokenizer/merges.txt"), model_max_length=24)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ))
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2, norm_num_groups=4,
    )
    vae = AutoencoderKL(**levels(2), block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=16, scaling_factor=0.5)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="v_prediction", timestep_spacing="trailing",
    )
    pipe = StableDiffusionPipeline(
        drawn(vae, 1), drawn(text, 2), tokenizer, drawn(unet, 3), scheduler, None, None, requires_safety_checker=False)
    folder = OUT / "stable_diffusion"
    pipe.save_pretrained(folder)
    # As published folders have them; neither is there, and neither is asked.
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    request = dict(prompt="red apple, noto style", negative_prompt="a cat", guidance_scale=4.0, steps=6, scheduler="ddim")
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    pipe.set_progress_bar_config(disable=True)
    denoised = pipe(
        [request["prompt"]] * 2, negative_prompt=[request["negative_prompt"]] * 2, guidance_scale=4.0,
        num_inference_steps=6, latents=latents, output_type="latent",
    ).images
    images = pipe.vae.decode(denoised / pipe.vae.config.scaling_factor).sample
    write("stable_diffusion", request, latents, denoised, images)


@torch.no_grad()
def long_prompt():
    import compel  # Needed here alone.

    pipe = StableDiffusionPipeline.from_pretrained(OUT / "stable_diffusion", safety_checker=None, feature_extractor=None)
    reader = compel.Compel(
        pipe.tokenizer, pipe.text_encoder, truncate_long_prompts=False, split_long_text_mode=compel.SplitLongTextMode.BRUTAL)
    prompt = "red apple and green apple on a table, noto style " * 2
    request = dict(prompt=prompt, negative_prompt="a cat", guidance_scale=4.0, steps=6, scheduler="ddim")
    states = [reader(request["prompt"]), reader(request["negative_prompt"])]
    wanted, unwanted = reader.pad_conditioning_tensors_to_same_length(states)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(12))
    pipe.set_progress_bar_config(disable=True)
    denoised = pipe(
        prompt_embeds=wanted, negative_prompt_embeds=unwanted, guidance_scale=4.0, num_inference_steps=6, latents=latents,
        output_type="latent",
    ).images
    images = pipe.vae.decode(denoised / pipe.vae.config.scaling_factor).sample
    tokens = len(pipe.tokenizer(prompt, add_special_tokens=False).input_ids)
    print(tokens, "tokens,", tuple(wanted.shape), tuple(unwanted.shape))
    write("long_prompt", request, latents, denoised, images)


def index(folder: Path, pipeline: str, **components):
    named = {name: [library, class_] for name, (library, class_) in components.items()}
    text = json.dumps({"_class_name": pipeline, "_diffusers_version": diffusers.__version__} | named, indent=2)
    (folder / "model_index.json").write_text(text + "\n")


def trajectory(scheduler, steps: int, x, predict):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t), t, x).prev_sample
    return x


@torch.no_grad()
def latent_diffusion():
    unet = drawn(UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    ), 5)
    # Answers that a trained network could give: latents stay about as large as they begin.
    unet.conv_out.weight.data *= 0.25
    vqvae = drawn(VQModel(**levels(2), block_out_channels=(8, 16), norm_num_groups=4, latent_channels=3, num_vq_embeddings=64, sample_size=16), 6)
    scheduler = DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", clip_sample=False, timestep_spacing="leading")
    folder = OUT / "latent_diffusion"
    unet.save_pretrained(folder / "unet"), vqvae.save_pretrained(folder / "vqvae"), scheduler.save_pretrained(folder / "scheduler")
    index(folder, "LDMPipeline", scheduler=("diffusers", "DDIMScheduler"), unet=("diffusers", "UNet2DModel"), vqvae=("diffusers", "VQModel"))
    latents = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    denoised = trajectory(scheduler, 5, latents, lambda x, t: unet(x, t).sample)
    images = vqvae.decode(denoised / vqvae.config.scaling_factor).sample
    write("latent_diffusion", dict(steps=5, scheduler="ddim"), latents, denoised, images)


@torch.no_grad()
def dit():
    network = drawn(DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10,
    ), 8)
    network.proj_out_2.weight.data *= 0.125
    vae = drawn(AutoencoderKL(**levels(2), block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=16, scaling_factor=0.18215), 9)
    scheduler = DPMSolverMultistepScheduler(beta_schedule="linear", final_sigmas_type="sigma_min", lower_order_final=True)
    folder = OUT / "dit"
    network.save_pretrained(folder / "transformer"), vae.save_pretrained(folder / "vae"), scheduler.save_pretrained(folder / "scheduler")
    # The name that facebook/DiT-XL-2-256 was published with.
    config = folder / "transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "Transformer2DModel"}, indent=2) + "\n")
    index(folder, "DiTPipeline", scheduler=("diffusers", "DPMSolverMultistepScheduler"), transformer=("diffusers", "Transformer2DModel"), vae=("diffusers", "AutoencoderKL"))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(10))

    def predict(x, t):
        answers = network(torch.cat([x, x]), t.expand(4), torch.tensor([3, 3, 10, 10])).sample
        wanted, unwanted = answers[:, :4].chunk(2)
        return unwanted + 2.5 * (wanted - unwanted)

    denoised = trajectory(scheduler, 5, latents, predict)
    images = vae.decode(denoised / vae.config.scaling_factor).sample
    write("dit", dict(class_label=3, guidance_scale=2.5, steps=5, scheduler="dpm++"), latents, denoised, images)


def forms():
    unet = drawn(UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ), 11)
    scheduler = DDIMScheduler()
    half = UNet2DModel.from_config(unet.config)
    half.load_state_dict(unet.state_dict())
    for name, model, options in [
        ("whole", unet, {}),
        ("variant", half.half(), dict(variant="fp16")),
        ("sharded", unet, dict(max_shard_size="10KB")),
        ("bin", unet, dict(safe_serialization=False)),
        ("bin_sharded", unet, dict(safe_serialization=False, max_shard_size="10KB")),
    ]:
        folder = OUT / "forms" / name
        model.save_pretrained(folder / "unet", **options), scheduler.save_pretrained(folder / "scheduler")
        index(folder, "DDPMPipeline", scheduler=("diffusers", "DDIMScheduler"), unet=("diffusers", "UNet2DModel"))


if __name__ == "__main__":
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    stable_diffusion()
    long_prompt()
    latent_diffusion()
    dit()
    forms()
