"""Writes the golden files of models/tests/lora.rs: LoRAs as programs write them, and what diffusers makes of a model's weights.

    pip install torch diffusers transformers peft safetensors
    python models/tests/golden/make_loras.py

Of the small pipeline in pipeline/stable_diffusion (make_pipelines.py). `lora/diffusers.safetensors` is what
`save_lora_weights` writes, with an alpha of its own in the metadata; `lora/kohya.safetensors` holds other factors under the names
of kohya's sd-scripts, convolutions and the text encoder among them, and an alpha each. `lora/*_merged.safetensors` hold the
weights that are other ones after `fuse_lora` with the scale in their metadata, as `unet.NAME` and `text_encoder.NAME`.
"""

from pathlib import Path

import diffusers
import peft
import torch
import transformers
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

HERE = Path(__file__).parent
PIPELINE = HERE / "pipeline" / "stable_diffusion"
OUT = HERE / "lora"
VERSIONS = dict(torch=torch.__version__, diffusers=diffusers.__version__, transformers=transformers.__version__, peft=peft.__version__)
ATTENTIONS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2"]
SCALE = 0.7


def pipeline():
    return StableDiffusionPipeline.from_pretrained(PIPELINE, safety_checker=None, feature_extractor=None)


def weights(pipe):
    named = {}
    for component in ["unet", "text_encoder"]:
        for name, weight in getattr(pipe, component).state_dict().items():
            # transformers from 5.6 on leaves out a part of the names.
            prefix = "text_model." if component == "text_encoder" and not name.startswith("text_model.") else ""
            named[f"{component}.{prefix}{name}"] = weight.clone()
    return named


def merged(file, name):
    before = weights(pipeline())
    pipe = pipeline()
    pipe.load_lora_weights(file)
    pipe.fuse_lora(lora_scale=SCALE)
    pipe.unload_lora_weights()
    after = weights(pipe)
    assert after.keys() == before.keys()
    changed = {key: after[key].contiguous() for key in before if not torch.equal(after[key], before[key])}
    save_file(changed, OUT / f"{name}_merged.safetensors", {**VERSIONS, "scale": str(SCALE)})
    print(name, len(changed), "weights changed")


def written_by_diffusers():
    torch.manual_seed(3)
    pipe = pipeline()
    config = LoraConfig(r=2, lora_alpha=3, target_modules=ATTENTIONS, init_lora_weights="gaussian")
    pipe.unet.add_adapter(config)
    text = LoraConfig(r=2, lora_alpha=1, target_modules=["q_proj", "fc1"], init_lora_weights="gaussian")
    pipe.text_encoder.add_adapter(text)
    for name, parameter in [*pipe.unet.named_parameters(), *pipe.text_encoder.named_parameters()]:
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    StableDiffusionPipeline.save_lora_weights(
        OUT,
        unet_lora_layers=get_peft_model_state_dict(pipe.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipe.text_encoder),
        unet_lora_adapter_metadata=config.to_dict(),
        text_encoder_lora_adapter_metadata=text.to_dict(),
        weight_name="diffusers.safetensors",
    )
    merged(OUT / "diffusers.safetensors", "diffusers")


def named_as_kohya():
    generator = torch.Generator().manual_seed(4)
    pipe = pipeline()
    tensors = {}
    for prefix, model in [("lora_unet", pipe.unet), ("lora_te", pipe.text_encoder)]:
        for module_name, module in model.named_modules():
            convolution = isinstance(module, torch.nn.Conv2d) and "attentions" not in module_name and "resnets" in module_name
            linear = isinstance(module, torch.nn.Linear) and any(part in module_name for part in ["attn", "ff", "mlp", "proj_in"])
            point = isinstance(module, torch.nn.Conv2d) and "proj_in" in module_name
            if not (convolution or linear or point):
                continue
            if prefix == "lora_te" and not module_name.startswith("text_model."):
                module_name = f"text_model.{module_name}"
            key = f"{prefix}_{module_name.replace('.', '_')}"
            out, *inside = module.weight.shape
            kernel = tuple(inside[1:])
            down = torch.randn(2, *inside, generator=generator) * 0.2
            up = torch.randn(out, 2, *([1] * len(kernel)), generator=generator) * 0.2
            tensors[f"{key}.lora_down.weight"] = down.half()
            tensors[f"{key}.lora_up.weight"] = up.half()
            tensors[f"{key}.alpha"] = torch.tensor(1.5)
    save_file(tensors, OUT / "kohya.safetensors", {"ss_network_module": "networks.lora", **VERSIONS})
    merged(OUT / "kohya.safetensors", "kohya")


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    written_by_diffusers()
    named_as_kohya()
