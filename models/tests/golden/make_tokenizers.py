"""Writes the golden files of models/tests/text.rs of tokenizers: what transformers' CLIPTokenizer makes of 10,000 strings.

    pip install transformers
    python models/tests/golden/make_tokenizers.py bpe_simple_vocab_16e6.txt

The argument is CLIP's vocabulary as OpenAI published it, which the crate instant-clip-tokenizer holds as well. `tokenizer/`
gets a small tokenizer with merges learned from a few words, in both forms (`vocab.json` with `merges.txt`, and
`tokenizer.json`), and `strings.json`: pieces that strings are put together of, by the same generator as in the test, digests
of the tokens of each hundred strings by the small and by the whole vocabulary, and the tokens of some strings in full.
"""

import collections
import json
import re
import sys
from pathlib import Path

import transformers
from transformers import CLIPTokenizer

OUT = Path(__file__).parent / "tokenizer"
COUNT, BLOCK = 10_000, 100
START, END = "<|startoftext|>", "<|endoftext|>"

PIECES = [
    " ", "  ", "\n", "\t", "\u00a0", "\u3000", "\u200b", "\u200d", "\ufe0f", "\u0000", "\u0007", "\u00ad", "\u2028",
    "a", "photo", "of", "Apple", "RED", "noto", "style", "it's", "don't", "we're", "I've", "I'm", "you'll", "he'd", "'S",
    "supercalifragilisticexpialidocious", "aaaaaaaaaaaaaaaaaaaaaaaa", "xX" * 30, "0", "42", "1234567890", "３", "½", "Ⅷ",
    ".", ",", "!?", "...", "(((masterpiece:1.2)))", "[x|y]", "--", "<", "|", ">", "@#$%^&*", "\"", "'", "`", "\\", "/",
    START, END, "<|endoftext|", "<|ENDOFTEXT|>", "endoftext", "<|startoftext|><|endoftext|>",
    "é", "e\u0301", "Å", "A\u030a", "ﬁ", "ǅ", "ß", "ẞ", "İ", "ı", "Σ", "ΟΔΟΣ", "ς", "ñ", "n\u0303\u0323", "\u0301", "क्षि", "ไทย",
    "中文", "日本語", "한국어", "한", "العربية", "עִברִית", "Привет", "ქართული", "ᏣᎳᎩ", "𝔘𝔫𝔦", "𠀀", "\U0010ffff", "\ufffd",
    "😀", "👩‍🚀", "👍🏽", "🏳️‍🌈", "🇩🇪", "❤️", "☺", "🫠", "👨‍👩‍👧‍👦", "🎉🎉🎉",
]
EXAMPLES = [
    "", " ", "red apple, noto style", "A photo of a CAT.", "it's 42 o'clock", "e\u0301 is é", "a<|endoftext|>b", "日本語 😀",
    "word " * 90,
]


class Draw:
    """The generator of formula.py, a number at a time."""

    def __init__(self, seed: int):
        self.state = (seed * 2_654_435_761 + 1) & 0xFFFFFFFF

    def below(self, limit: int) -> int:
        self.state = (self.state * 1_664_525 + 1_013_904_223) & 0xFFFFFFFF
        return (self.state >> 8) % limit


def string(seed: int) -> str:
    """Up to forty pieces, a tenth of them any character, two thirds of them with a space behind."""
    draw, text = Draw(seed), ""
    for _ in range(draw.below(40)):
        if draw.below(10) == 0:
            code = draw.below(0x30000)
            text += chr(code) if not 0xD800 <= code < 0xE000 else "?"
        else:
            text += PIECES[draw.below(len(PIECES))]
        if draw.below(3) > 0:
            text += " "
    return text


def letters() -> list:
    """A character for each byte, in the order of CLIP's vocabulary."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in keep] + [chr(256 + i) for i in range(256 - len(keep))]


def shown() -> dict:
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return dict(zip([*keep, *(b for b in range(256) if b not in keep)], letters()))


def learned(words: list, count: int) -> list:
    pieces = [[shown()[b] for b in word.encode()] for word in words]
    for piece in pieces:
        piece[-1] += "</w>"
    merges = []
    while len(merges) < count:
        pairs = collections.Counter(pair for piece in pieces for pair in zip(piece, piece[1:]))
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        for piece in pieces:
            i = 0
            while i + 1 < len(piece):
                if (piece[i], piece[i + 1]) == best:
                    piece[i : i + 2] = [piece[i] + piece[i + 1]]
                i += 1
    return merges


def vocabulary(merges: list) -> dict:
    alone = letters()
    tokens = alone + [letter + "</w>" for letter in alone] + [a + b for a, b in merges] + [START, END]
    return {token: i for i, token in enumerate(tokens)}


def digests(tokenizer: CLIPTokenizer) -> list:
    found = []
    for first in range(0, COUNT, BLOCK):
        digest = 0xCBF29CE484222325
        for seed in range(first, first + BLOCK):
            for token in [*tokenizer(string(seed), add_special_tokens=False).input_ids, 0xFFFFFFFF]:
                digest = ((digest ^ token) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
        found.append(f"{digest:016x}")
    return found


def main() -> None:
    OUT.mkdir(exist_ok=True)
    words = [word for piece in PIECES for word in re.findall(r"\w+|[^\w\s]+", piece.lower())]
    merges = learned(words, 250)
    (OUT / "vocab.json").write_text(json.dumps(vocabulary(merges), ensure_ascii=False))
    (OUT / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    small = CLIPTokenizer(str(OUT / "vocab.json"), str(OUT / "merges.txt"), model_max_length=77)
    small.backend_tokenizer.save(str(OUT / "tokenizer.json"), pretty=False)
    lines = Path(sys.argv[1]).read_text().split("\n")
    published = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    whole = CLIPTokenizer(vocabulary(published), published, model_max_length=77)
    longest = max(len(whole(string(seed), add_special_tokens=False).input_ids) for seed in range(COUNT))
    strings = {
        "transformers": transformers.__version__,
        "pieces": PIECES,
        "small": digests(small),
        "whole": digests(whole),
        "examples": [
            {
                "text": text,
                "small": small(text, add_special_tokens=False).input_ids,
                "whole": whole(text, add_special_tokens=False).input_ids,
            }
            for text in EXAMPLES
        ],
    }
    (OUT / "strings.json").write_text(json.dumps(strings) + "\n")
    print(f"{len(whole)} tokens, strings of up to {longest} of them")


if __name__ == "__main__":
    main()
