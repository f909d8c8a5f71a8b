"""Correct first: networks against diffusers' f32 on the CPU over fresh random inputs, images against f32, and
what the batch changes."""

from __future__ import annotations

import itertools
import json
import secrets
import shutil
from pathlib import Path

import common
from common import BUNDLE, WORK, Results, Server, psnr

# Relative error (Frobenius norm) of one evaluation.
LIMITS = {"f32": 1e-4, "bf16": 3e-2, "f16": 5e-3}
PSNR_DB = 40.0
STEPS = 50
BATCHES = [1, 2, 7, 16]

PLAIN = {
    "sample_size": 32, "in_channels": 3, "out_channels": 3, "layers_per_block": 1,
    "block_out_channels": (32, 64), "norm_num_groups": 8, "attention_head_dim": 16,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
# Every way that a layer of the networks is run: both paddings of the strided convolution, resampling residual
# blocks with scale-shift norms, attention of one head and of several, odd channels and sizes, classes.
NETWORKS = {
    "plain": PLAIN,
    "lower-right": PLAIN | {"downsample_padding": 0, "attention_head_dim": None},
    "adm": PLAIN | {
        "out_channels": 6, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet", "upsample_type": "resnet", "num_class_embeds": 5,
    },
    "odd": PLAIN | {"sample_size": 20, "block_out_channels": (24, 40), "attention_head_dim": 8},
    "dit": {
        "sample_size": 16, "patch_size": 2, "in_channels": 3, "out_channels": 6, "num_layers": 2,
        "num_attention_heads": 2, "attention_head_dim": 16, "num_embeds_ada_norm": 5,
    },
}


def inputs(config, batch: int, seed: int) -> dict:
    import numpy

    generator = numpy.random.default_rng(seed)
    shape = (batch, config.in_channels, config.sample_size, config.sample_size)
    found = {
        "sample": generator.standard_normal(shape, numpy.float32),
        "timestep": generator.integers(0, 1000, batch).astype(numpy.int64),
    }
    if classes := config.get("num_class_embeds") or config.get("num_embeds_ada_norm"):
        found["class_labels"] = generator.integers(0, classes, batch).astype(numpy.int64)
    return found


def networks(results: Results, models: Path, device: str, tiny: bool) -> None:
    import numpy
    import torch

    folders = sorted(folder for folder in models.iterdir() if (folder / "model_index.json").exists())
    seed = secrets.randbits(32)
    for dtype, limit in LIMITS.items():
        if device == "cpu" and dtype != "f32":
            continue
        with Server(models, device, dtype, "--max-batch", 16) as server:
            for folder in folders:
                network = common.load_network(folder)
                # The first evaluation of so many rows goes another way than those after it, which are captured.
                for batch, again in itertools.product(BATCHES[:2] if tiny else BATCHES, range(3)):
                    asked = inputs(network.config, batch, seed + again)
                    given = [torch.from_numpy(one) for one in asked.values()]
                    with torch.no_grad():
                        expected = network(*given, return_dict=False)[0].numpy()
                    answer = server.evaluate(folder.name, asked)
                    # Of the worst row, so that a row that is wrong in a large batch shows.
                    wrong = [
                        float(numpy.linalg.norm(a - e) / numpy.linalg.norm(e))
                        for a, e in zip(answer.astype(float), expected.astype(float), strict=True)
                    ]
                    error = max(wrong) if all(numpy.isfinite(wrong)) else float("nan")
                    results.judge(
                        "network", error, limit, model=folder.name, batch=batch, again=again, dtype=dtype, seed=seed
                    )


def images(results: Results, models: Path, model: str, device: str, steps: int, n: int) -> None:
    """Whole images, against the CPU's in f32; alone and among others; and again."""
    import numpy

    with Server(models, "cpu", "f32") as server:
        reference = [common.pixels(png) for png in server.images(model, n, 1, steps)]
    for dtype in ["f32"] if device == "cpu" else LIMITS:
        with Server(models, device, dtype) as server:
            together = server.images(model, n, 1, steps)
            again = server.images(model, n, 1, steps)
            alone = [server.images(model, 1, 1 + i, steps)[0] for i in range(n)]
        shown = [common.pixels(png) for png in together]
        worst = min(psnr(one, other) for one, other in zip(shown, reference, strict=True))
        results.judge("images, PSNR against f32 on the CPU", worst, PSNR_DB, at_least=True, dtype=dtype, steps=steps)
        same = sum(one == other for one, other in zip(together, again, strict=True))
        results.add(repeated=dtype, identical=same, of=n)
        moved = [psnr(a, common.pixels(b)) for a, b in zip(shown, alone, strict=True)]
        same = sum(one == other for one, other in zip(together, alone, strict=True))
        limit = 100.0 if device == "cpu" else PSNR_DB
        results.judge("images alone and among others, PSNR", min(moved), limit, at_least=True, dtype=dtype, identical=same, of=n)
        spread = max(float(numpy.abs(a - common.pixels(b)).max()) for a, b in zip(shown, alone))
        results.add(levels_moved_by_the_batch=spread, dtype=dtype)


def samplers(results: Results, models: Path, device: str, steps: int, n: int) -> None:
    """Every sampler, from a network that learns its variance and is thresholded, against the CPU's."""
    learned = {"variance_type": "learned_range", "thresholding": True, "sample_max_value": 3.0}
    for name, scheduler in {"learned": learned, "fixed": {}}.items():
        common.write_folder(models / name, NETWORKS["adm"], 7, scheduler)
    names = ["ddpm", "ddim", "dpm++", "euler", "heun"]
    drawn = []
    for place in ["cpu", device]:
        with Server(models, place, "f32") as server:
            drawn.append({
                (model, name): [common.pixels(png) for png in server.images(model, n, 1, steps, scheduler=name, class_label=1)]
                for model in ["learned", "fixed"] for name in names
            })
    for (model, name), expected in drawn[0].items():
        worst = min(psnr(one, other) for one, other in zip(drawn[1][model, name], expected, strict=True))
        results.judge("images of a sampler, PSNR against the CPU", worst, PSNR_DB, at_least=True, model=model, sampler=name)


def rows(results: Results, models: Path, model: str, device: str, steps: int, n: int) -> None:
    """One seed at every row of the batch, of a server that pads its batches: the same file every time."""
    for dtype in ["f32"] if device == "cpu" else LIMITS:
        with Server(models, device, dtype, "--max-batch", n, "--deterministic") as server:
            # A request's image i has seed + i, and its images share evaluations, in order.
            [expected] = server.images(model, 1, 2 * n, steps, class_label=0)
            found = [server.images(model, n, 2 * n - row, steps, class_label=0)[row] for row in range(n)]
        same = sum(one == expected for one in found)
        results.judge("rows of a padded batch that give the same image", same, n, at_least=True, dtype=dtype)


def yardstick(results: Results, folder: Path, device: str, steps: int, n: int) -> None:
    """What PyTorch's own bf16 network costs an image, its sampler in f32."""
    import torch
    from diffusers import DDIMScheduler

    target = "cuda" if device.startswith("cuda") and torch.cuda.is_available() else "cpu"

    @torch.no_grad()
    def draw(dtype):
        unet = common.load_network(folder).to(target, dtype)
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        scheduler.set_timesteps(steps)
        generator = torch.Generator().manual_seed(0)
        size = unet.config.sample_size
        x = torch.randn(n, unet.config.in_channels, size, size, generator=generator).to(target)
        classes = unet.config.num_class_embeds
        labels = torch.arange(n, device=target) % classes if classes else None
        for t in scheduler.timesteps:
            times = torch.full((n,), int(t), device=target)
            answer = unet(x.to(dtype), times, labels, return_dict=False)[0].float()
            x = scheduler.step(answer, t, x, eta=0.0).prev_sample
        return ((x / 2 + 0.5).clamp(0, 1) * 255).round().double().cpu().numpy()

    worst = min(psnr(one, other) for one, other in zip(draw(torch.bfloat16), draw(torch.float32)))
    results.add(yardstick="PyTorch, bf16 network, f32 sampler: PSNR against f32", value=worst, steps=steps)


def training(results: Results, device: str, steps: int, batch: int) -> None:
    """The same training on the device, in f32 and in its own type, and on the CPU."""
    data = WORK / "noise.npz"
    import numpy

    pictures = numpy.random.default_rng(0).integers(0, 256, (64, 32, 32, 3)).astype(numpy.uint8)
    numpy.savez(data, arr_0=pictures)
    config = WORK / "train-check.json"
    config.write_text(json.dumps({"_class_name": "UNet2DModel"} | {k: list(v) if isinstance(v, tuple) else v for k, v in PLAIN.items()}))
    logs = {}
    for name, place, dtype in [("cpu", "cpu", "auto"), ("f32", device, "f32"), ("bf16", device, "auto")]:
        out = WORK / f"train-check-{name}"
        shutil.rmtree(out, ignore_errors=True)
        command = ["train", "--data", data, "--config", config, "--out", out, "--steps", steps, "--batch", batch]
        common.run(*command, "--sample-every", 0, "--device", place, "--dtype", dtype)
        lines = (out / "training/log.jsonl").read_text().splitlines()
        logs[name] = [json.loads(line) for line in lines]
    for dtype in ["f32", "bf16"]:
        compare(results, "training", dtype, logs[dtype], logs["cpu"])


def distillation(results: Results, device: str) -> None:
    """Three steps without data, the bundled pair's, on the device and on the CPU."""
    student = BUNDLE / "models/fashion-mnist-student/unet/config.json"
    logs = {}
    for place in ["cpu", device]:
        out = WORK / "distil-check"
        shutil.rmtree(out, ignore_errors=True)
        command = ["distill", "--models", BUNDLE / "models", "--teacher", "fashion-mnist-teacher", "--student", student]
        command += ["--rho", 0.002, "--walk-steps", 20, "--steps", 3, "--batch", 2, "--sample-every", 0]
        common.run(*command, "--out", out, "--device", place, "--dtype", "f32")
        lines = (out / "training/log.jsonl").read_text().splitlines()
        logs[place] = [json.loads(line) for line in lines]
    compare(results, "distillation", "f32", logs[device], logs["cpu"])


def compare(results: Results, what: str, dtype: str, log: list[dict], expected: list[dict]) -> None:
    """Two logs of training, step by step."""
    for figure in ["loss", "gradient_norm"]:
        found = [step[figure] for step in log]
        apart = max(abs(a - b[figure]) / b[figure] for a, b in zip(found, expected, strict=True))
        limit = 1e-3 if dtype == "f32" else 3e-2
        results.judge(f"{what}'s {figure} against the CPU's", apart, limit, dtype=dtype, found=found)


def main() -> None:
    options = common.arguments(__doc__).parse_args()
    results = Results("check")
    common.describe(results, options.device)
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    models = WORK / "check-models"
    shutil.rmtree(models, ignore_errors=True)
    for i, (name, config) in enumerate(NETWORKS.items()):
        common.write_folder(models / name, config, i)
    teacher = "fashion-mnist-teacher"
    shutil.copytree(BUNDLE / "models" / teacher, models / teacher)
    networks(results, models, options.device, options.tiny)
    alone = WORK / "check-teacher"
    shutil.rmtree(alone, ignore_errors=True)
    shutil.copytree(models / teacher, alone / teacher)
    steps, n = (5, 2) if options.tiny else (STEPS, 8)
    images(results, alone, teacher, options.device, steps, n)
    drawn = WORK / "check-samplers"
    shutil.rmtree(drawn, ignore_errors=True)
    samplers(results, drawn, options.device, steps, n)
    rows(results, alone, teacher, options.device, steps, n)
    yardstick(results, alone / teacher, options.device, steps, n)
    training(results, options.device, *((3, 2) if options.tiny else (10, 16)))
    distillation(results, options.device)
    if options.device.startswith("cuda"):
        with Server(alone, options.device, "auto") as server:
            gpu = {k: v for k, v in server.metrics().items() if k.startswith("understudy_gpu_")}
        results.judge("metrics of the GPU", len(gpu), 4, at_least=True, found=gpu)
    results.end()


if __name__ == "__main__":
    main()
