#!/usr/bin/env python3
"""The parts of text-to-image pipelines beside what else runs them on a CPU, in turns: U-Nets, decoders, a text encoder.

    python3 benches/peers/run.py --setup           # once
    python3 benches/peers/components.py            # builds the release example, measures, prints, writes JSON

Weights are random, of the real sizes. Each peer meets Understudy alone, since together they would not fit into memory: both are processes
that take turns, and a ratio is the median of the rounds' ratios. Outputs are held against PyTorch's in f64 (the text encoder's in f32).
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
ENVIRONMENT = HERE / ".venv"
PEERS = ["torch-eager", "torch-compile", "openvino", "onnxruntime", "candle"]
SEED = 5
AGREES = {"f32": 1e-4, "bf16": 1e-1}

CROSS = "CrossAttnDownBlock2D"
STABLE_DIFFUSION = dict(
    sample_size=64, cross_attention_dim=768, attention_head_dim=8, down_block_types=[CROSS] * 3 + ["DownBlock2D"],
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, block_out_channels=[320, 640, 1280, 1280], layers_per_block=2,
)
BK_TINY = dict(
    sample_size=64, cross_attention_dim=768, attention_head_dim=8, down_block_types=[CROSS] * 3,
    up_block_types=["CrossAttnUpBlock2D"] * 3, block_out_channels=[320, 640, 1280], layers_per_block=1, mid_block_type=None,
)
VAE = dict(
    block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=4, sample_size=512,
    down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
)
XL = dict(
    sample_size=128, cross_attention_dim=2048, attention_head_dim=[5, 10, 20], down_block_types=["DownBlock2D"] + [CROSS] * 2,
    up_block_types=["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"], block_out_channels=[320, 640, 1280], layers_per_block=2,
    transformer_layers_per_block=[1, 2, 10], use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
PIXART = dict(sample_size=64, caption_channels=4096)
CLIP = dict(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)

# The part, its configuration, the side of a latent, images at a time.
CASES = {
    "sd15-unet-256": ("unet", STABLE_DIFFUSION, 32, 1),
    "sd15-unet-256-batch-4": ("unet", STABLE_DIFFUSION, 32, 4),
    "bk-tiny-unet-256": ("unet", BK_TINY, 32, 1),
    "bk-tiny-unet-256-batch-4": ("unet", BK_TINY, 32, 4),
    "vae-decode-256": ("decoder", VAE, 32, 1),
    "taesd-decode-512": ("tiny", {}, 64, 1),
    "clip-l": ("text", CLIP, 0, 1),
    "pixart-512": ("pixart", PIXART, 64, 1),
    "sdxl-unet-512": ("xl", XL, 64, 1),
}
# What candle-transformers has of its own, and at one timestep a batch.
CANDLE = {"sd15-unet-256": "candle-network", "vae-decode-256": "candle-decoder"}
# Networks with a time; what is told of a prompt: its tokens and their width.
NETWORKS = {"unet": (77, 768), "pixart": (120, 4096), "xl": (77, 2048)}
# Under which names inputs are in their file, in the order in which a part takes them.
KEYS = ("sample", "timestep", "states", "added", "ids")
# Too large for references in f64 beside all else: weights are stored as f16, and the reference is in f32.
LARGE = {"xl"}


def module(kind: str, config: dict):
    """The part with random weights, as its library makes them."""
    import torch
    from diffusers import AutoencoderKL, AutoencoderTiny, PixArtTransformer2DModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(SEED)
    match kind:
        case "unet":
            return UNet2DConditionModel(**config).eval()
        case "xl":
            return UNet2DConditionModel(**config).half().eval()
        case "pixart":
            return PixArtTransformer2DModel(**config).eval()
        case "decoder":
            return AutoencoderKL(**config).eval()
        case "tiny":
            return AutoencoderTiny(**config).eval()
        case "text":
            return CLIPTextModel(CLIPTextConfig(**config)).eval()


def opened(kind: str, folder: Path, dtype=None):
    """The part from its folder, as a module that answers with a tensor; of f32 unless another type is asked for."""
    import torch
    from diffusers import AutoencoderKL, AutoencoderTiny, PixArtTransformer2DModel, UNet2DConditionModel
    from transformers import CLIPTextModel

    classes = {"unet": UNet2DConditionModel, "xl": UNet2DConditionModel, "pixart": PixArtTransformer2DModel, "decoder": AutoencoderKL, "tiny": AutoencoderTiny, "text": CLIPTextModel}

    class Part(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = classes[kind].from_pretrained(folder, low_cpu_mem_usage=False, torch_dtype=dtype or torch.float32).eval()

        def forward(self, *inputs):
            if kind == "unet":
                return self.part(*inputs, return_dict=False)[0]
            if kind == "xl":
                sample, time, states, added = inputs
                told = {"text_embeds": added[:, :-6], "time_ids": added[:, -6:]}
                return self.part(sample, time, states, added_cond_kwargs=told, return_dict=False)[0]
            if kind == "pixart":
                sample, time, states = inputs
                told = {"resolution": None, "aspect_ratio": None}
                return self.part(sample, states, time, added_cond_kwargs=told, return_dict=False)[0]
            if kind == "text":
                return self.part(*inputs, return_dict=False)[0]
            return self.part.decode(*inputs, return_dict=False)[0]

    return Part()


def inputs(kind: str, config: dict, side: int, batch: int) -> dict:
    import torch

    generator = torch.Generator().manual_seed(SEED)
    if kind == "text":
        ids = torch.randint(1, config["vocab_size"] - 2, (batch, 77), generator=generator)
        ids[:, -1] = config["vocab_size"] - 1
        return {"ids": ids}
    sample = torch.randn(batch, 4, side, side, generator=generator)
    if kind not in NETWORKS:
        return {"sample": sample}
    states = torch.randn(batch, *NETWORKS[kind], generator=generator)
    told = {"sample": sample, "timestep": torch.linspace(999, 1, batch).round(), "states": states}
    if kind == "xl":
        sizes = torch.tensor([[8.0 * side, 8.0 * side, 0, 0, 8.0 * side, 8.0 * side]]).repeat(batch, 1)
        told["added"] = torch.cat([torch.randn(batch, 1280, generator=generator), sizes], 1)
    return told


class Process:
    """One side, which answers a line of JSON with a line."""

    def __init__(self, command: list, threads: int) -> None:
        self.log = tempfile.TemporaryFile("w+")
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "RAYON_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [str(one) for one in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment,
        )
        self._answer()

    def ask(self, **command) -> dict:
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return self._answer()

    def end(self) -> int:
        peak = self.ask(do="end")["max_rss_bytes"]
        self.process.wait()
        return peak

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise SystemExit(f"{self.process.args} broke:\n{self.log.read()[-3000:]}")
        return json.loads(line)


def prepare(name: str, scratch: Path) -> None:
    """Writes the part, what it is asked, and what it should answer."""
    import torch
    from safetensors.torch import save_file

    kind, config, side, batch = CASES[name]
    module(kind, config).save_pretrained(scratch / "part")
    told = inputs(kind, config, side, batch)
    save_file({key: value.int() if key == "ids" else value for key, value in told.items()}, scratch / "inputs.safetensors")
    with torch.no_grad():
        part = opened(kind, scratch / "part")
        # transformers' mask of the text encoder cannot be made in f64.
        if kind == "text" or kind in LARGE:
            answer = part(*told.values()).double()
        else:
            answer = part.double()(*(one.double() for one in told.values()))
    save_file({"answer": answer}, scratch / "reference.safetensors")


def convert(name: str, scratch: Path) -> None:
    """Writes a large part as OpenVINO reads it, with weights of f16."""
    import openvino as ov
    from safetensors.torch import load_file

    loaded = load_file(scratch / "inputs.safetensors")
    told = tuple(loaded[key] for key in KEYS if key in loaded)
    part = opened(CASES[name][0], scratch / "part")
    model = ov.convert_model(part, example_input=told, input=[tuple(one.shape) for one in told])
    ov.save_model(model, scratch / "openvino.xml", compress_to_fp16=True)


def compare(arguments, example: Path, name: str) -> dict:
    from machine import OtherLoad
    from safetensors.torch import load_file

    kind, _, _, batch = CASES[name]
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        folder, file = Path(scratch) / "part", Path(scratch) / "inputs.safetensors"
        # In a process of its own, which gives its memory back.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(prepare, (name, Path(scratch)))
            if kind in LARGE and "openvino" in arguments.peers:
                pool.apply(convert, (name, Path(scratch)))
        reference = load_file(Path(scratch) / "reference.safetensors")["answer"]

        def error(process: Process) -> float:
            path = Path(scratch) / "output.safetensors"
            process.ask(do="output", path=str(path))
            found = load_file(path)["output"].double()
            return float((found - reference).norm() / reference.norm())

        rows = {}
        own_kind = "network" if kind in NETWORKS else "decoder" if kind == "tiny" else kind
        ours = Process([example, own_kind, folder, file, arguments.precision], arguments.threads)
        ours_error = error(ours)
        for peer in arguments.peers:
            command = [sys.executable, HERE / "components.py", "--worker", peer, kind, folder, file, arguments.precision]
            if peer == "candle":
                if name not in CANDLE or arguments.precision != "f32":
                    continue
                command = [example, CANDLE[name], folder, file, arguments.precision]
            other = Process(command, arguments.threads)
            errors = {"understudy": ours_error, peer: error(other)}
            for who, off in errors.items():
                if not off <= AGREES[arguments.precision]:
                    raise SystemExit(f"{name}: {who} does not answer as the f64 reference does: {off:.1e} off")
            load = OtherLoad([ours.process.pid, other.process.pid])
            rounds = []
            for _ in range(arguments.rounds):
                rounds.append([statistics.median(side.ask(do="time", seconds=arguments.seconds)["seconds"]) for side in (ours, other)])
            busy = load.share()
            ratio = statistics.median(theirs / own for own, theirs in rounds)
            own, theirs = (statistics.median(column) for column in zip(*rounds))
            rows[peer] = {
                "rounds": rounds, "ratio": ratio, "relative_errors": errors, "other_load": round(busy, 3), "max_rss_bytes": other.end(),
            }
            print(f"{name}: understudy {own * 1e3:.1f} ms, {peer} {theirs * 1e3:.1f} ms, {ratio:.2f} ×; others used {busy:.0%}", flush=True)
        return {"case": name, "batch": batch, "peers": rows, "max_rss_bytes": ours.end()}


def worker(runtime: str, kind: str, folder: Path, file: Path, precision: str) -> None:
    """One peer, for ever."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ["TORCHINDUCTOR_FREEZING"] = "1"
    import torch
    from safetensors.torch import load_file, save_file
    from worker import max_rss_bytes

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    loaded = load_file(file)
    told = tuple(loaded[key].long() if key == "ids" else loaded[key] for key in KEYS if key in loaded)
    # In f32 a large one would leave no room for the other side.
    converted = folder.parent / "openvino.xml"
    if runtime != "openvino" and kind in LARGE and precision == "bf16":
        part = opened(kind, folder, torch.bfloat16)
        told = tuple(one.bfloat16() if key != "timestep" else one for key, one in zip(KEYS, told))
    elif runtime != "openvino" or not converted.exists():
        part = opened(kind, folder)
    if runtime == "openvino":
        import openvino as ov

        if converted.exists():
            model = ov.Core().read_model(converted)
        else:
            model = ov.convert_model(part, example_input=told, input=[tuple(one.shape) for one in told])
        settings = {
            "INFERENCE_NUM_THREADS": int(os.environ["OMP_NUM_THREADS"]), "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY",
        }
        request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
        arrays = [one.numpy() for one in told]
        evaluate = lambda: torch.from_numpy(request.infer(arrays)[0])  # noqa: E731
    elif runtime == "onnxruntime":
        import onnxruntime as ort

        path = folder.parent / "model.onnx"
        names = [f"input_{i}" for i in range(len(told))]
        torch.onnx.export(part, told, str(path), input_names=names, opset_version=18, dynamo=False)
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
        options.inter_op_num_threads = 1
        session = ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])
        feed = {key: one.numpy() for key, one in zip(names, told)}
        evaluate = lambda: torch.from_numpy(session.run(None, feed)[0])  # noqa: E731
    else:
        if kind not in ("text", "pixart"):
            part = part.to(memory_format=torch.channels_last)
        network = torch.compile(part) if runtime == "torch-compile" else part

        def evaluate():
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                return network(*told).float()

    for _ in range(2):
        evaluate()

    def answer(reply: dict) -> None:
        print(json.dumps(reply), file=answers, flush=True)

    answer({"ready": True})
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "time":
            seconds: list[float] = []
            while len(seconds) < 3 or sum(seconds) < command["seconds"]:
                began = time.perf_counter()
                evaluate()
                seconds.append(time.perf_counter() - began)
            answer({"seconds": seconds})
        elif command["do"] == "output":
            output = evaluate()
            save_file({"output": output.contiguous()}, command["path"])
            answer({"shape": list(output.shape)})
        else:
            answer({"max_rss_bytes": max_rss_bytes()})
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    parser.add_argument("--precision", default="f32", choices=["f32", "bf16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="of each side's turn, about")
    parser.add_argument("--example", type=Path, help="the built example, instead of building it")
    parser.add_argument("--scratch", type=Path, help="a folder with 10 GB of room")
    parser.add_argument("--out", type=Path, help="default: results/components-DATE.json")
    arguments = parser.parse_args()
    if arguments.worker:
        runtime, kind, folder, file, precision = arguments.worker
        return worker(runtime, kind, Path(folder), Path(file), precision)
    if not sys.prefix.startswith(str(ENVIRONMENT)) and ENVIRONMENT.exists():
        os.execv(ENVIRONMENT / "bin" / "python", [ENVIRONMENT / "bin" / "python", *sys.argv])
    example = arguments.example
    if example is None:
        command = ["cargo", "build", "--release", "--locked", "-p", "understudy-models", "--example", "component"]
        subprocess.run(command, cwd=ROOT, check=True)
        example = ROOT / "target" / "release" / "examples" / "component"
    from machine import describe

    results = {"date": str(datetime.date.today()), "machine": describe(), "precision": arguments.precision, "threads": arguments.threads}
    results["cases"] = [compare(arguments, example, name) for name in arguments.cases]
    out = arguments.out or HERE / "results" / f"components-{results['date']}.json"
    out.write_text(json.dumps(results, indent=2) + "\n")
    print(out)


if __name__ == "__main__":
    main()
