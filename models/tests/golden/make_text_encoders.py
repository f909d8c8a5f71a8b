"""Writes the golden files of models/tests/text.rs of encoders: what small transformers CLIP text models answer.

    pip install torch transformers safetensors
    python models/tests/golden/make_text_encoders.py

Weights are by `formula.py` and not in the files; everything is worked out in f64. Each file holds `last`, `penultimate`
(the states before the last layer, without the last norm) and `pooled` (`text_embeds` of a model with a projection); the
metadata holds `config`, `class`, `ids` and the versions of torch and transformers.
"""

import json
from pathlib import Path

import torch
import transformers
from formula import fill
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

OUT = Path(__file__).parent / "text_encoder"


def prompt(start: int, words: list, end: int, pad: int, length: int) -> list:
    return ([start, *words, end] + [pad] * length)[:length]


# The class, its configuration, and the tokens of prompts.
CASES = {
    # As Stable Diffusion 1.x's, whose file does not tell the token that ends a text: the largest does.
    "largest_ends": (
        CLIPTextModel,
        dict(vocab_size=90, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
             bos_token_id=0, eos_token_id=2),
        [prompt(88, [5, 17, 2, 40], 89, 89, 77), prompt(88, list(range(3, 78)), 89, 89, 77), prompt(88, [], 89, 89, 77)],
    ),
    # The shape of our own text-to-image pipeline's.
    "emoji": (
        CLIPTextModel,
        dict(vocab_size=1414, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=24, bos_token_id=1412, eos_token_id=1413, pad_token_id=1413),
        [prompt(1412, [700, 3, 1400, 99], 1413, 1413, 24), prompt(1412, [1411], 1413, 1413, 24)],
    ),
    # As SDXL's second: the exact function, a projection, texts filled with zeros; the first token 50 ends a text.
    "projected": (
        CLIPTextModelWithProjection,
        dict(vocab_size=60, hidden_size=30, intermediate_size=50, num_hidden_layers=2, num_attention_heads=2,
             max_position_embeddings=19, hidden_act="gelu", projection_dim=21, bos_token_id=49, eos_token_id=50,
             layer_norm_eps=1e-6),
        [prompt(49, [5, 55, 2], 50, 0, 19), prompt(49, [59, 7], 50, 50, 19)],
    ),
    "one_layer": (
        CLIPTextModelWithProjection,
        dict(vocab_size=20, hidden_size=12, intermediate_size=7, num_hidden_layers=1, num_attention_heads=3,
             max_position_embeddings=8, projection_dim=5, bos_token_id=18, eos_token_id=2),
        [prompt(18, [5, 4], 19, 0, 8), prompt(18, [2, 2], 19, 19, 8)],
    ),
}


@torch.no_grad()
def write(name: str, kind, arguments: dict, ids: list) -> None:
    config = CLIPTextConfig(**arguments)
    model = fill(kind(config))
    answer = model(torch.tensor(ids), output_hidden_states=True)
    pooled = answer.text_embeds if kind is CLIPTextModelWithProjection else answer.pooler_output
    tensors = {"last": answer.last_hidden_state, "penultimate": answer.hidden_states[-2], "pooled": pooled}
    metadata = {
        "config": config.to_json_string(),
        "class": json.dumps(kind.__name__),
        "ids": json.dumps(ids),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    tensors = {key: value.float().contiguous() for key, value in tensors.items()}
    save_file(tensors, OUT / f"{name}.safetensors", metadata)
    print(f"{name}: " + ", ".join(f"|{key}| up to {value.abs().max():.3g}" for key, value in tensors.items()))


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    for name, case in CASES.items():
        write(name, *case)
