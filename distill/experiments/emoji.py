#!/usr/bin/env python3
"""The captioned pictures that the bundled text-to-image teacher is measured with: emoji in four artists' styles.

    python3 distill/experiments/emoji.py FOLDER

About 1,000 things (animals, food, places, objects, activities, faces) in the styles of Noto (Apache-2.0), Twemoji
(CC-BY 4.0) and Fluent, flat and with gradients (MIT), 64×64 pixels on white. The drawings come from four npm packages,
the names from a fifth. A caption is Unicode's name and the style ("red apple, noto style"), a class is style and group
("noto, Food & Drink"). One pair of thing and style in twenty is held out, by its caption's hash: the teacher never saw it.

    FOLDER/all, FOLDER/seen, FOLDER/held-out     images, and metadata.jsonl with their captions and classes
    FOLDER/seen.txt, FOLDER/held-out.txt         the captions, a line each

Needs npm, and from PyPI resvg-py, numpy, pillow. Takes about a minute.
"""

import argparse
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import resvg_py
from PIL import Image

STYLES = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "fluent": "@iconify-json/fluent-emoji@1.2.7",
}
NAMES = "unicode-emoji-json@0.9.0"
GROUPS = {"Animals & Nature", "Food & Drink", "Travel & Places", "Objects", "Activities", "Smileys & Emotion"}
SIDE = 64
# Of the drawing's longer side, on each of its sides.
MARGIN = 0.04


def package(name, folder, member):
    """The JSON file `member` of an npm package."""
    command = ["npm", "pack", name, "--silent"]
    archive = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    with tarfile.open(Path(folder) / archive.stdout.split()[-1]) as tar:
        return json.load(tar.extractfile(f"package/{member}"))


def render(icon, usual):
    """A drawing on white; nothing where the renderer does not know one of its filters."""
    width, height = (icon.get(side, usual.get(side, 16)) for side in ("width", "height"))
    pad = MARGIN * max(width, height)
    box = f"{-pad} {-pad} {width + 2 * pad} {height + 2 * pad}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{2 * SIDE}" height="{2 * SIDE}" viewBox="{box}">{icon["body"]}</svg>'
    )
    try:
        picture = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    except BaseException as problem:
        if type(problem).__name__ != "PanicException":
            raise
        return None
    white = Image.new("RGBA", picture.size, "white")
    whole = Image.alpha_composite(white, picture).convert("RGB")
    return whole.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def pictures():
    """Every picture, its caption and its class."""
    with tempfile.TemporaryDirectory() as folder:
        emoji = package(NAMES, folder, "data-by-emoji.json").values()
        sets = {style: package(name, folder, "icons.json") for style, name in STYLES.items()}
    for thing in emoji:
        if thing["group"] not in GROUPS:
            continue
        slug, name = thing["slug"].replace("_", "-"), thing["name"].replace("’", "'")
        for style, icons in sets.items():
            picture = render(icons["icons"][slug], icons) if slug in icons["icons"] else None
            if picture is not None:
                yield picture, f"{name}, {style} style", f"{style}, {thing['group']}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    lines = {"all": [], "seen": [], "held-out": []}
    for part in lines:
        (folder / part).mkdir(parents=True)
    for number, (picture, caption, label) in enumerate(pictures()):
        held_out = hashlib.sha256(caption.encode()).digest()[0] % 20 == 0
        for part in ("all", "held-out" if held_out else "seen"):
            name = f"{number:04}.png"
            picture.save(folder / part / name)
            lines[part].append({"file_name": name, "text": caption, "label": label})
    for part, rows in lines.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / part / "metadata.jsonl").write_text(text)
        if part != "all":
            (folder / f"{part}.txt").write_text("".join(row["text"] + "\n" for row in rows))
        print(f"{len(rows)} pictures in {folder / part}")


if __name__ == "__main__":
    main()
