"""Writes the golden files of models/tests/t5.rs: what small transformers T5EncoderModels answer, and what T5Tokenizer makes of
strings.

    pip install torch transformers safetensors sentencepiece protobuf
    python models/tests/golden/make_t5.py

`t5/`: weights are by `formula.py` and not in the files; everything but the variances of norms, which transformers has in f32,
is worked out in f64. Each file holds `row.N`, the states of a prompt's own tokens, of a batch that is filled to the longest
and masked. The metadata holds `config`, `ids` and the versions of torch and transformers.

`t5_tokenizer/`: a small sentencepiece model with a map of characters of its own, learned from the strings' pieces
(`spiece.model`); the same as transformers writes it (`tokenizer.json`); and `strings.json`: the tokens of strings by the
generator of make_tokenizers.py.
"""

import io
import json
from pathlib import Path

import sentencepiece
import torch
import transformers
from formula import fill
from make_tokenizers import PIECES, string
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel, T5Tokenizer

HERE = Path(__file__).parent
COUNT = 400

SMALL = dict(vocab_size=50, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4)
LONG = [(7 * i * i + 3) % 49 for i in range(170)] + [1]

# The configuration, and the tokens of prompts.
CASES = {
    # As T5 1.1, which PixArt has; a prompt longer than the distances that are told apart.
    "gated_gelu": (SMALL | dict(feed_forward_proj="gated-gelu", num_layers=3), [LONG, [5, 17, 40, 1], [1]]),
    "relu": (SMALL | dict(feed_forward_proj="relu", layer_norm_epsilon=1e-3), [[3, 4, 1], [30, 9, 8, 7, 45, 1]]),
    "gated_silu": (
        SMALL
        | dict(feed_forward_proj="gated-silu", num_layers=1, relative_attention_num_buckets=6,
               relative_attention_max_distance=9),
        [[*range(2, 22), 1], [49, 1]],
    ),
}

EXAMPLES = [
    "", " ", "A small cactus with a happy face in the Sahara desert.", "  spaces   everywhere \n\t", "e\u0301 is é", "日本語 😀",
    "a</s>b <pad> <unk> <extra_id_3>", "ＦＵＬＬ width ﬁ", "▁under ▁ score", "word " * 150,
]


@torch.no_grad()
def encoder(name: str, arguments: dict, prompts: list) -> None:
    config = T5Config(is_encoder_decoder=False, use_cache=False, **arguments)
    model = fill(T5EncoderModel(config))
    longest = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])
    states = model(ids, attention_mask=mask).last_hidden_state
    tensors = {f"row.{i}": states[i, : len(prompt)].float().contiguous() for i, prompt in enumerate(prompts)}
    metadata = {
        "config": config.to_json_string(use_diff=False),
        "ids": json.dumps(prompts),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    save_file(tensors, HERE / "t5" / f"{name}.safetensors", metadata)
    print(f"{name}: |states| up to {states.abs().max():.3g}")


def tokenizer() -> None:
    out = HERE / "t5_tokenizer"
    # As the map of NFKC, which T5 has, would have it: full width, ligatures, what is composed, kinds of white space.
    rules = {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)}
    rules |= {"ﬁ": "fi", "e\u0301": "é", "A\u030a": "Å", "½": "1\u20442", "Ⅷ": "VIII", "\u00a0": " ", "\u3000": " ", "\u00ad": ""}
    codes = lambda text: " ".join(f"{ord(c):X}" for c in text)
    rule_file = out / "rules.tsv"
    rule_file.write_text("".join(f"{codes(a)}\t{codes(b)}\n" for a, b in sorted(rules.items())))
    plain = [piece for piece in PIECES if piece.strip() and "\u0000" not in piece]
    words = [word.lower() for example in EXAMPLES for word in example.split()]
    sentences = plain + words + [" ".join(plain[i : i + 9]).lower() for i in range(0, len(plain), 3)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, model_type="unigram", vocab_size=300,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=0.98,
        normalization_rule_tsv=str(rule_file), num_threads=1, minloglevel=2,
    )
    rule_file.unlink()
    (out / "spiece.model").write_bytes(model.getvalue())
    small = T5Tokenizer.from_pretrained(out)
    small.backend_tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    ids = lambda text: small(text).input_ids
    strings = {
        "transformers": transformers.__version__,
        "pieces": PIECES,
        "tokens": len(small),
        "ids": [ids(string(seed)) for seed in range(COUNT)],
        "examples": [{"text": text, "ids": ids(text), "prompt": ids(text.lower().strip())} for text in EXAMPLES],
    }
    (out / "strings.json").write_text(json.dumps(strings, separators=(",", ":")) + "\n")
    unknown = sum(row.count(2) for row in strings["ids"])
    print(f"{len(small)} tokens, {sum(map(len, strings['ids']))} in {COUNT} strings, {unknown} of them unknown")


if __name__ == "__main__":
    (HERE / "t5").mkdir(exist_ok=True)
    (HERE / "t5_tokenizer").mkdir(exist_ok=True)
    for name, case in CASES.items():
        encoder(name, *case)
    tokenizer()
