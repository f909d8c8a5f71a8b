#!/usr/bin/env python3
"""Runs the Python of a model folder's README.md as it stands, and looks at the images that it makes.

    card.py FOLDER [PICTURE]

With PICTURE the images are kept there. Needs torch and diffusers. The folder itself is left as it is.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

folder = Path(sys.argv[1])
kept = [Path(name).resolve() for name in sys.argv[2:]]
readme = (folder / "README.md").read_text()
assert readme.startswith("---\nlibrary_name: diffusers\n"), "no YAML for the Hub"
code = readme.split("```python\n")[1].split("```")[0]
with tempfile.TemporaryDirectory() as scratch:
    copy = shutil.copytree(folder, Path(scratch) / "model", ignore=shutil.ignore_patterns("training", "report"))
    os.chdir(copy)
    exec(code, {})
    # A row of images, or one after a prompt.
    made = Path("images.png" if Path("images.png").exists() else "image.png")
    pixels = np.asarray(Image.open(made).convert("L"), dtype=np.float64)
    for picture in kept:
        shutil.copy(made, picture)
    os.chdir("/")
height, width = pixels.shape
assert width % height == 0 and (width > height) == (made.name == "images.png"), f"{width}x{height} is no row of images"
images = pixels.reshape(height, -1, height).transpose(1, 0, 2)
# Neither flat, nor noise, nor one image again and again: neighbouring pixels of a picture are alike.
spread = images.std(axis=(1, 2))
step = np.abs(np.diff(images, axis=2)).mean(axis=(1, 2))
assert (spread > 10).all(), f"flat images: {spread}"
assert (step < spread).all(), f"noise: {step} between neighbours, {spread} in all"
assert len({image.tobytes() for image in images}) == len(images), "one image again"
print(f"{folder.name}: {len(images)} images of {height}x{height} from diffusers")
