#!/usr/bin/env python3
"""Whole images after prompts: clients of the server beside diffusers' own pipeline, compiled, and beside the bare network and decoder.

    python3 benches/peers/run.py --setup           # once
    python3 benches/peers/text_images.py           # builds the release binary and example, measures, prints, writes JSON

The bundled `emoji-text-to-image`, guided, f32. Clients ask for one image each at the same time and get PNG files; diffusers makes as many in
one batch, up to PNG files. Bare is the time of the evaluations of network and decoder alone, in the batches that all clients together fill.
All take turns, and a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ENVIRONMENT = HERE / ".venv"
MODEL = "emoji-text-to-image"
PROMPTS = [
    f"{colour} {thing}, {style} style"
    for colour, thing, style in [
        ("red", "apple", "noto"), ("green", "apple", "noto"), ("red", "heart", "twemoji"), ("blue", "heart", "noto"),
        ("brown", "dog", "noto"), ("white", "house", "twemoji"), ("yellow", "face", "openmoji"), ("green", "tree", "noto"),
    ]
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--understudy", type=Path, help="this binary, instead of building one")
    parser.add_argument("--example", type=Path, help="the built example `component`, instead of building it")
    parser.add_argument("--out", type=Path, help="default: results/text-images-DATE.json")
    arguments = parser.parse_args()
    if not sys.prefix.startswith(str(ENVIRONMENT)) and ENVIRONMENT.exists():
        os.execv(ENVIRONMENT / "bin" / "python", [ENVIRONMENT / "bin" / "python", *sys.argv])
    if arguments.understudy is None:
        subprocess.run(["cargo", "build", "--release", "--locked"], cwd=ROOT, check=True)
        arguments.understudy = ROOT / "target/release/understudy"
    if arguments.example is None:
        command = ["cargo", "build", "--release", "--locked", "-p", "understudy-models", "--example", "component"]
        subprocess.run(command, cwd=ROOT, check=True)
        arguments.example = ROOT / "target/release/examples/component"
    from machine import OtherLoad, describe

    result = {"date": str(datetime.date.today()), "machine": describe(), "model": MODEL, "clients": len(PROMPTS)}
    result |= {"steps": arguments.steps, "guidance_scale": arguments.guidance_scale, "threads": arguments.threads}
    with tempfile.TemporaryDirectory() as scratch:
        # The server last: whoever fails before leaves none behind.
        theirs, bare = diffusers(arguments), Bare(arguments, Path(scratch))
        sides = {"understudy": Server(arguments), "diffusers, compiled": theirs, "bare": bare}
        for make in sides.values():
            make()
        rounds: dict[str, list[float]] = {name: [] for name in sides}
        load = OtherLoad([os.getpid(), *sides["understudy"].pids(), *sides["bare"].pids()])
        for _ in range(arguments.rounds):
            for name, make in sides.items():
                began = time.perf_counter()
                told = make()
                rounds[name].append((told or time.perf_counter() - began) / len(PROMPTS))
        result["other_load"] = round(load.share(), 3)
        sides["bare"].end()
        sides["understudy"].end()
    own = rounds["understudy"]
    result["seconds_per_image"] = {name: {"rounds": each, "median": statistics.median(each)} for name, each in rounds.items()}
    result["times_understudy"] = {
        name: statistics.median(other / mine for other, mine in zip(each, own)) for name, each in rounds.items()
    }
    for name, each in rounds.items():
        print(f"{name}: {statistics.median(each) * 1e3:.1f} ms an image, {result['times_understudy'][name]:.2f} × Understudy's time")
    out = arguments.out or HERE / "results" / f"text-images-{result['date']}.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(out)


class Server:
    """The server, which as many clients ask at the same time."""

    def __init__(self, arguments) -> None:
        self.arguments = arguments
        command = [arguments.understudy, "serve", "--port=0", f"--models={ROOT / 'models/zoo'}", f"--threads={arguments.threads}"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"RUST_LOG": "warn"})
        for line in self.process.stdout:
            if line.startswith("Understudy serves on "):
                self.url = line.split()[3]
            if line.startswith("Ready after "):
                break
        self.clients = concurrent.futures.ThreadPoolExecutor(len(PROMPTS))

    def __call__(self) -> None:
        for png in self.clients.map(self.image, range(len(PROMPTS))):
            assert png.startswith(b"\x89PNG")

    def image(self, number: int) -> bytes:
        body = {
            "model": MODEL, "prompt": PROMPTS[number], "seed": number, "scheduler": "ddim", "num_inference_steps": self.arguments.steps,
            "guidance_scale": self.arguments.guidance_scale,
        }
        headers = {"Content-Type": "application/json", "Accept": "image/png"}
        request = urllib.request.Request(f"{self.url}/v1/images/generations", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=600) as reply:
            return reply.read()

    def pids(self) -> list[int]:
        return [self.process.pid]

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()


def diffusers(arguments):
    """diffusers' pipeline, whose network and decoder are compiled."""
    os.environ["TORCHINDUCTOR_FREEZING"] = "1"
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextModel

    torch.set_num_threads(arguments.threads)
    folder = ROOT / "models/zoo" / MODEL
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", torch_dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32),
        scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.unet = torch.compile(pipe.unet.to(memory_format=torch.channels_last))
    pipe.vae.decode = torch.compile(pipe.vae.decode)

    def make() -> None:
        made = pipe(PROMPTS, num_inference_steps=arguments.steps, guidance_scale=arguments.guidance_scale)
        for image in made.images:
            image.save(io.BytesIO(), "PNG")

    return make


class Bare:
    """The evaluations alone: the network's, of two rows an image, and the decoder's."""

    def __init__(self, arguments, scratch: Path) -> None:
        import torch
        from components import Process
        from safetensors.torch import save_file

        folder = ROOT / "models/zoo" / MODEL
        unet, text = (json.loads((folder / part / "config.json").read_text()) for part in ("unet", "text_encoder"))
        rows, side, channels = 2 * len(PROMPTS), unet["sample_size"], unet["in_channels"]
        sample = torch.randn(rows, channels, side, side)
        states = torch.randn(rows, text["max_position_embeddings"], unet["cross_attention_dim"])
        told = {"sample": sample, "timestep": torch.full((rows,), 500.0), "states": states}
        save_file(told, scratch / "network.safetensors")
        save_file({"sample": sample[: len(PROMPTS)].contiguous()}, scratch / "decoder.safetensors")
        self.steps = arguments.steps
        parts = (("network", "unet"), ("decoder", "vae"))
        self.processes = [
            Process([arguments.example, kind, folder / part, scratch / f"{kind}.safetensors", "f32"], arguments.threads) for kind, part in parts
        ]

    def __call__(self) -> float:
        network, decoder = (statistics.median(it.ask(do="time", seconds=1)["seconds"]) for it in self.processes)
        return self.steps * network + decoder

    def pids(self) -> list[int]:
        return [it.process.pid for it in self.processes]

    def end(self) -> None:
        for it in self.processes:
            it.end()


if __name__ == "__main__":
    main()
