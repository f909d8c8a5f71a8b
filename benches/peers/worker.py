"""One peer in a process of its own, so that no runtime's threads or memory disturb another's.

Reads commands from standard input, one JSON object per line, and answers each with one line:
{"do": "time", "seconds": s}  evaluates for about s seconds  -> {"seconds": [each evaluation's]}
{"do": "output", "path": p}   evaluates once, writes a .npy  -> {"shape": [...]}
{"do": "end"}                                                -> {"max_rss_bytes": n}
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

LEAST_EVALUATIONS = 3
WARM_UPS = 2


def torch_network(folder: Path, batch: int, precision: str, compiled: bool) -> Callable:
    import torch
    from networks import Network

    network = Network(folder).to(memory_format=torch.channels_last)
    sample, *rest = network.inputs(batch)
    sample = sample.to(memory_format=torch.channels_last)
    if compiled:
        network = torch.compile(network)

    def evaluate():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return network(sample, *rest).float().numpy()

    return evaluate


def openvino(folder: Path, batch: int, precision: str) -> Callable:
    import openvino as ov
    from networks import Network

    network = Network(folder)
    inputs = network.inputs(batch)
    model = ov.convert_model(
        network, example_input=inputs, input=[tuple(one.shape) for one in inputs]
    )
    settings = {
        "INFERENCE_NUM_THREADS": int(os.environ["OMP_NUM_THREADS"]),
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    arrays = [one.numpy() for one in inputs]
    return lambda: request.infer(arrays)[0]


def onnxruntime(folder: Path, batch: int) -> Callable:
    import onnxruntime as ort
    import torch
    from networks import Network

    network = Network(folder)
    inputs = network.inputs(batch)
    names = ["sample", "timestep", "class_labels"][: len(inputs)]
    file = io.BytesIO()
    torch.onnx.export(network, inputs, file, input_names=names, opset_version=18, dynamo=False)
    options = ort.SessionOptions()
    options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(file.getvalue(), options, ["CPUExecutionProvider"])
    feed = {name: one.numpy() for name, one in zip(names, inputs)}
    return lambda: session.run(None, feed)[0]


def ddim_images(folder: Path, batch: int, steps: int, compiled: bool) -> Callable:
    """What a diffusers pipeline does for a class-conditional U-Net, up to PNG files in memory."""
    import torch
    from diffusers import DDIMScheduler
    from PIL import Image
    from networks import Network

    network = Network(folder).to(memory_format=torch.channels_last)
    sample, _, *labels = network.inputs(batch)
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(steps)
    if compiled:
        network = torch.compile(network)

    @torch.no_grad()
    def images():
        x = sample.to(memory_format=torch.channels_last)
        for timestep in scheduler.timesteps:
            answer = network(x, timestep.expand(batch), *labels)
            x = scheduler.step(answer, timestep, x, eta=0.0).prev_sample
        pixels = ((x / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        for picture in pixels:
            Image.fromarray(picture.squeeze()).save(io.BytesIO(), "PNG")
        return pixels

    return images


def training(folder: Path, compiled: bool) -> Callable:
    """Training steps: forward, mean squared error, backward, AdamW; each answers with its loss."""
    import torch
    from diffusers import UNet2DModel
    from safetensors.torch import load_file

    network = UNet2DModel.from_pretrained(folder, low_cpu_mem_usage=False).train()
    network = network.to(memory_format=torch.channels_last)
    batch = load_file(folder / "batch.safetensors")
    sample = batch["sample"].to(memory_format=torch.channels_last)
    target = batch["target"].to(memory_format=torch.channels_last)
    labels = batch["class_labels"].long() if "class_labels" in batch else None
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    run = torch.compile(network) if compiled else network

    def step():
        answer = run(sample, batch["timestep"], labels, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(answer, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach().reshape(1).numpy()

    return step


def product(precision: str) -> Callable:
    """A 2048³ matrix product: what the machine's arithmetic reaches in practice."""
    import torch

    size = (2048, 2048)
    if precision == "int8":
        a, b = (torch.randint(-127, 128, size, dtype=torch.int8) for _ in range(2))
        return lambda: torch._int_mm(a, b).numpy()
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[precision]
    a, b = (torch.randn(size).to(dtype) for _ in range(2))
    return lambda: torch.mm(a, b).float().numpy()


def max_rss_bytes() -> int:
    """As `understudy bench` reads it; getrusage's figure starts at the parent's size on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def build(arguments: argparse.Namespace) -> Callable:
    folder, batch, precision = arguments.model, arguments.batch, arguments.precision
    match arguments.runtime:
        case "torch-eager" | "torch-compile" as name:
            return torch_network(folder, batch, precision, name == "torch-compile")
        case "openvino":
            return openvino(folder, batch, precision)
        case "onnxruntime":
            return onnxruntime(folder, batch)
        case "diffusers-eager" | "diffusers-compile" as name:
            return ddim_images(folder, batch, arguments.steps, name == "diffusers-compile")
        case "train-eager" | "train-compile" as name:
            return training(folder, name == "train-compile")
        case "product":
            return product(precision)
        case other:
            raise SystemExit(f"no runtime {other}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runtime", required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", default="f32")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()

    # Libraries print; the answers have standard output to themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # Before torch is imported: freezing folds constants and packs weights, as inference should.
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    if not arguments.runtime.startswith("train"):
        os.environ["TORCHINDUCTOR_FREEZING"] = "1"
    import torch

    torch.set_num_threads(arguments.threads)
    evaluate = build(arguments)
    for _ in range(WARM_UPS):
        evaluate()

    def answer(reply: dict) -> None:
        print(json.dumps(reply), file=answers, flush=True)

    answer({"ready": True})
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "time":
            seconds: list[float] = []
            while len(seconds) < LEAST_EVALUATIONS or sum(seconds) < command["seconds"]:
                began = time.perf_counter()
                evaluate()
                seconds.append(time.perf_counter() - began)
            answer({"seconds": seconds})
        elif command["do"] == "output":
            import numpy

            output = evaluate()
            numpy.save(command["path"], output)
            answer({"shape": list(output.shape)})
        else:
            answer({"max_rss_bytes": max_rss_bytes()})
            return


if __name__ == "__main__":
    main()
