#!/usr/bin/env python3
"""What whole pipelines of the real sizes, with random weights, take of memory and time in the server.

    python3 benches/peers/run.py --setup            # once
    cargo build --release
    python3 benches/peers/pipelines.py              # makes the folders, serves each alone, prints, writes JSON

Every row is a server of one model, which draws an image of each size, one after another, guided. Resident memory is read after
each image; the largest there was includes loading.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ZOO = ROOT / "models" / "zoo"
ENVIRONMENT = HERE / ".venv"
SEED = 5

# The pipeline, its type of numbers, and the sides of its images in their order; the first is its own.
ROWS = [
    ("fashion-mnist-teacher", "f32", []),
    ("emoji-text-to-image", "f32", []),
    ("bk-sdm-tiny", "f32", [512]),
    ("bk-sdm-tiny", "bf16", [512]),
    ("stable-diffusion-1.5", "f32", [256]),
    ("stable-diffusion-1.5", "f32", [512]),
    ("stable-diffusion-1.5", "f32", [512, 256]),
    ("stable-diffusion-1.5", "bf16", [512]),
    ("stable-diffusion-xl", "bf16", [512]),
]


def make(name: str, folder: Path) -> None:
    """A pipeline of random f16 weights; its tokenizer is the bundled model's, whose words are fewer."""
    import torch
    from components import BK_TINY, CLIP, STABLE_DIFFUSION, VAE, XL
    from diffusers import (
        AutoencoderKL, EulerDiscreteScheduler, PNDMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(SEED)
    tokenizer = CLIPTokenizer.from_pretrained(ZOO / "emoji-text-to-image" / "tokenizer", model_max_length=77)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    text = CLIPTextModel(CLIPTextConfig(**CLIP, **ends)).half()
    vae = AutoencoderKL(**VAE).half()
    if name == "stable-diffusion-xl":
        second = CLIPTextConfig(
            vocab_size=49408, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
            projection_dim=1280, hidden_act="gelu", **ends,
        )
        pipeline = StableDiffusionXLPipeline(
            vae=vae, unet=UNet2DConditionModel(**XL).half(), text_encoder=text, tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(second).half(), tokenizer_2=tokenizer, scheduler=EulerDiscreteScheduler(**betas),
        )
    else:
        unet = UNet2DConditionModel(**(BK_TINY if name == "bk-sdm-tiny" else STABLE_DIFFUSION)).half()
        pipeline = StableDiffusionPipeline(
            vae=vae, unet=unet, text_encoder=text, tokenizer=tokenizer, safety_checker=None, feature_extractor=None,
            scheduler=PNDMScheduler(**betas, skip_prk_steps=True, set_alpha_to_one=False), requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)


def own_size(folder: Path, side: int) -> None:
    """Makes `side` pixels the size of the pipeline's images."""
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": side // 8}))


class Server:
    """One model, served."""

    def __init__(self, binary: Path, folder: Path, dtype: str, threads: int) -> None:
        command = [binary, "serve", "--model", f"{folder.name}={folder}", "--dtype", dtype, "--threads", threads, "--port", 0, "--max-pixels", 1 << 20]
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen([str(one) for one in command], stdout=self.log, stderr=self.log)
        self.address, self.name = self._address(), folder.name
        while not self._ready():
            time.sleep(0.5)

    def _address(self) -> str:
        while True:
            self.log.seek(0)
            text = self.log.read()
            if found := re.search(r"http://[\d.]+:\d+", text):
                return found[0]
            if self.process.poll() is not None:
                raise SystemExit(f"the server ended:\n{text[-2000:]}")
            time.sleep(0.1)

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/v2/health/ready") as answer:
                return answer.status == 200
        except OSError:
            return False

    def draw(self, steps: int, side: int | None, prompt: bool) -> float:
        """Seconds that an image takes."""
        body = {"model": self.name, "num_inference_steps": steps, "seed": SEED}
        body |= {"prompt": "red apple, noto style", "guidance_scale": 5.0} if prompt else {}
        body |= {"size": f"{side}x{side}"} if side else {}
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{self.address}/v1/images/generations", json.dumps(body).encode(), headers)
        began = time.perf_counter()
        with urllib.request.urlopen(request, timeout=3600) as answer:
            json.load(answer)
        return time.perf_counter() - began

    def bytes(self, field: str) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()


def measure(arguments, name: str, dtype: str, sides: list[int]) -> dict:
    folder = ZOO / name if (ZOO / name).is_dir() else arguments.scratch / name
    if not folder.is_dir():
        make(name, folder)
    if sides:
        own_size(folder, sides[0])
    server = Server(arguments.understudy, folder, dtype, arguments.threads)
    prompt = name != "fashion-mnist-teacher"
    images = []
    for side in sides or [None]:
        # What is built for a size is built with its first image. Steps cost what two images of different numbers differ by.
        server.draw(1, side, prompt)
        few, many = (statistics.median(server.draw(steps, side, prompt) for _ in range(3)) for steps in (2, 4))
        image = {"side": side, "resident_bytes": server.bytes("VmRSS"), "seconds_per_step": (many - few) / 2, "seconds_beside_steps": 2 * few - many}
        images.append(image)
        print(
            f"{name} {dtype} {side or ''}: {image['resident_bytes'] / 1e9:.2f} GB resident, {image['seconds_per_step'] * 1e3:.0f} ms a step, "
            f"{image['seconds_beside_steps'] * 1e3:.0f} beside", flush=True,
        )
    row = {"model": name, "dtype": dtype, "images": images, "largest_resident_bytes": server.bytes("VmHWM")}
    server.end()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=sorted({name for name, _, _ in ROWS}))
    parser.add_argument("--understudy", type=Path, default=ROOT / "target" / "release" / "understudy")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "understudy-pipelines", help="a folder with 12 GB of room")
    parser.add_argument("--out", type=Path, help="default: results/pipelines-DATE.json")
    arguments = parser.parse_args()
    if not sys.prefix.startswith(str(ENVIRONMENT)) and ENVIRONMENT.exists():
        os.execv(ENVIRONMENT / "bin" / "python", [ENVIRONMENT / "bin" / "python", *sys.argv])
    from machine import describe

    arguments.scratch.mkdir(exist_ok=True)
    results = {"date": str(datetime.date.today()), "machine": describe(), "threads": arguments.threads}
    results["rows"] = [measure(arguments, *row) for row in ROWS if row[0] in arguments.models]
    out = arguments.out or HERE / "results" / f"pipelines-{results['date']}.json"
    out.write_text(json.dumps(results, indent=2) + "\n")
    print(out)


if __name__ == "__main__":
    main()
