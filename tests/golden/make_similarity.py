"""Records what scikit-image makes of pairs of 8-bit images, for src/similarity.rs.

    python tests/golden/make_similarity.py

writes similarity.json beside itself. Needs scikit-image and numpy. Images are flat, rows top to
bottom, channels interleaved.
"""

import json
from pathlib import Path

import numpy as np
import skimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

random = np.random.default_rng(5)


def smooth(height, width, channels):
    y, x = np.mgrid[0:height, 0:width]
    phase = random.uniform(0, 6, channels)
    waves = np.sin(x[..., None] / 4 + phase) * np.cos(y[..., None] / 5 + phase)
    return 127.5 + 120 * waves


def pair(height, width, channels, noise):
    clean = smooth(height, width, channels)
    other = clean + random.normal(0, noise, clean.shape)
    return [np.clip(np.round(image), 0, 255).astype(np.uint8) for image in (clean, other)]


def case(teacher, student):
    height, width, channels = teacher.shape
    psnr = peak_signal_noise_ratio(teacher, student, data_range=255)
    ssim = structural_similarity(teacher, student, channel_axis=-1, data_range=255)
    return {
        "width": width,
        "height": height,
        "channels": channels,
        "teacher": teacher.flatten().tolist(),
        "student": student.flatten().tolist(),
        "psnr_db": float(psnr),
        "ssim": float(ssim),
    }


shapes = [(7, 7, 1), (8, 8, 3), (9, 13, 1), (12, 8, 3), (16, 16, 1)]
cases = [case(*pair(*shape, noise)) for shape in shapes for noise in (0.4, 10, 80)]
black, white = (np.full((8, 8, 1), value, np.uint8) for value in (0, 255))
cases.append(case(black, white))
report = {"scikit-image": skimage.__version__, "numpy": np.__version__, "cases": cases}
(Path(__file__).parent / "similarity.json").write_text(json.dumps(report) + "\n")
