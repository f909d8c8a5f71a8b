"""Where every tensor of Stable Diffusion is in a checkpoint of one file: single_file_1.json, single_file_2.json, single_file_xl.json.

    python make_single_files.py --diffusers CHECKOUT

Two references that nobody here wrote must agree: the scripts in a checkout of diffusers that write such files
(scripts/convert_diffusers_to_original_stable_diffusion.py and ..._sdxl.py), and diffusers' loader that reads them
(diffusers.loaders.single_file_utils). Tensors are as large as the real ones, but each is one number, repeated: which it
is tells where a tensor came from.

A file maps each component to a table of `[name here, name there, how]`: "same", "point" (a convolution of single pixels
there), "transposed", or "third 0" to "third 2" (a part of a matrix there).
"""

import argparse
import importlib.util
import json
import pathlib

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as reading
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

HERE = pathlib.Path(__file__).parent

UNETS = {
    "1": dict(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8,
        down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        block_out_channels=[320, 640, 1280, 1280], layers_per_block=2,
    ),
}
UNETS["2"] = dict(UNETS["1"], cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True)
UNETS["xl"] = dict(
    sample_size=128, cross_attention_dim=2048, attention_head_dim=[5, 10, 20], use_linear_projection=True,
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    block_out_channels=[320, 640, 1280], layers_per_block=2, transformer_layers_per_block=[1, 2, 10],
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
)
VAE = dict(
    block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=4, sample_size=512,
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
)
TEXTS = {
    "1": dict(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
    # OpenCLIP has a layer more, which is not used.
    "2": dict(vocab_size=49408, hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16),
}
TEXTS["xl"] = TEXTS["1"]
BIG = dict(vocab_size=49408, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280)


def shapes(model, config):
    with torch.device("meta"):
        built = model(config) if isinstance(config, CLIPTextConfig) else model.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in built.state_dict().items() if not name.endswith("position_ids")}


def marked(shapes, start):
    """A number a tensor, as large as the tensor but without its memory."""
    return {name: torch.tensor(float(start + i)).expand(shape) for i, (name, shape) in enumerate(shapes.items())}


def mark(tensor):
    return int(tensor.flatten()[0])


def module(path):
    spec = importlib.util.spec_from_file_location("convert", path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--diffusers", type=pathlib.Path, required=True, help="a checkout of diffusers")
    scripts = parser.parse_args().diffusers / "scripts"
    for family in ["1", "2", "xl"]:
        script = "sdxl" if family == "xl" else "stable_diffusion"
        writing = module(scripts / f"convert_diffusers_to_original_{script}.py")
        table = {}
        unet = marked(shapes(UNet2DConditionModel, UNETS[family]), 0)
        written = {f"model.diffusion_model.{name}": tensor for name, tensor in writing.convert_unet_state_dict(dict(unet)).items()}
        read = reading.convert_ldm_unet_checkpoint(dict(written), UNETS[family])
        table["unet"] = compared(unet, written, read)

        vae = marked(shapes(AutoencoderKL, VAE), 0)
        written = {f"first_stage_model.{name}": tensor for name, tensor in writing.convert_vae_state_dict(dict(vae)).items()}
        read = reading.convert_ldm_vae_checkpoint(dict(written), VAE)
        table["vae"] = compared(vae, written, read)

        config = CLIPTextConfig(**TEXTS[family])
        text = marked(shapes(CLIPTextModel, config), 0)
        # transformers from 5.6 on leaves out a part of the names, which folders still have.
        text = {name if name.startswith("text_model.") else f"text_model.{name}": tensor for name, tensor in text.items()}
        if family == "xl":
            written = {f"conditioner.embedders.0.transformer.{name}": tensor for name, tensor in text.items()}
            read = reading.convert_ldm_clip_checkpoint(dict(written))
            table["text_encoder_2"] = big(writing)
        elif family == "1":
            written = {f"cond_stage_model.transformer.{name}": tensor for name, tensor in text.items()}
            read = reading.convert_ldm_clip_checkpoint(dict(written))
        else:
            converted = writing.convert_text_enc_state_dict_v20({f"transformer.{name}": tensor for name, tensor in text.items()})
            written = {f"cond_stage_model.model.{name}": tensor for name, tensor in converted.items()}
            with torch.device("meta"):
                model = CLIPTextModel(config)
            read = reading.convert_open_clip_checkpoint(model, dict(written))
        table["text_encoder"] = compared(text, written, read)
        versions = {"diffusers": diffusers.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
        text = json.dumps({"versions": versions, **table}, indent=0, ensure_ascii=True)
        # A row a line.
        text = text.replace("[\n\"", "[\"").replace("\",\n\"", "\", \"").replace("\"\n]", "\"]")
        (HERE / f"single_file_{family}.json").write_text(text + "\n")
        print(family, {name: len(rows) for name, rows in table.items()})


def big(writing):
    """XL's second encoder, whose projection is the other way round there."""
    config = CLIPTextConfig(**BIG)
    text = marked(shapes(CLIPTextModelWithProjection, config), 0)
    converted = writing.convert_openclip_text_enc_state_dict(dict(text))
    # As the script does below its functions.
    converted["text_projection"] = converted.pop("text_projection.weight").T
    written = {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in converted.items()}
    with torch.device("meta"):
        model = CLIPTextModelWithProjection(config)
    read = reading.convert_open_clip_checkpoint(model, dict(written), prefix="conditioner.embedders.1.model.")
    return compared(text, written, read)


def compared(here, written, read):
    """Rows of the table; what was written and read again must be what there was."""
    assert set(read) == set(here), sorted(set(read) ^ set(here))[:4]
    there = {}
    for name, tensor in written.items():
        if name.endswith((".in_proj_weight", ".in_proj_bias")):
            for part, third in enumerate(tensor.chunk(3)):
                there[mark(third)] = (name, f"third {part}")
        else:
            there[mark(tensor)] = (name, None)
    rows = []
    for name, tensor in sorted(here.items()):
        assert mark(read[name]) == mark(tensor), name
        assert read[name].shape == tensor.shape, name
        source, how = there[mark(tensor)]
        if how is None and name == "text_projection.weight":
            how = "transposed"
        elif how is None:
            how = "same" if written[source].shape == tensor.shape else "point"
        rows.append([name, source, how])
    return rows


if __name__ == "__main__":
    main()
