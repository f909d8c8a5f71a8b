"""A class-conditional teacher of CIFAR-10-JPEG: understudy's training steps beside PyTorch's, then a teacher,
trained for as long as is left, to be gone on with by the same command."""

from __future__ import annotations

import copy
import json
import shutil
import time
from pathlib import Path

import common
from common import OUT, TEACHER, TINY, WORK, Results


NAME = "cifar10-jpeg-teacher"


def architecture(options) -> dict:
    return TINY if options.tiny else TEACHER


def config_file(config: dict, name: str) -> Path:
    path = WORK / name
    lists = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    path.write_text(json.dumps({"_class_name": "UNet2DModel"} | lists))
    return path


class Trainer:
    """Training on images with PyTorch: bf16 evaluations, f32 weights, AdamW, a running average."""

    def __init__(self, config: dict, data: Path, batch: int, device: str, options) -> None:
        import torch
        from diffusers import DDPMScheduler, UNet2DModel

        torch.manual_seed(0)
        self.torch, self.batch, self.device = torch, batch, "cuda" if device.startswith("cuda") else "cpu"
        images, labels = common.cifar_tensors(data, 256 if options.tiny else None)
        self.images, self.labels = images.to(self.device), labels.to(self.device)
        network = UNet2DModel(**config).to(self.device, memory_format=torch.channels_last)
        self.network, self.average = network, copy.deepcopy(network).eval().requires_grad_(False)
        self.scheduler = DDPMScheduler(**common.COSINE, prediction_type="epsilon", clip_sample=True)
        self.alpha_bar = self.scheduler.alphas_cumprod.to(self.device)
        fused = self.device == "cuda"
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=6e-4, weight_decay=0.0, betas=(0.9, 0.99), fused=fused)
        self.run = network if options.eager else torch.compile(network)
        self.steps = 0

    def resume(self, path: Path) -> None:
        if not path.exists():
            return
        state = self.torch.load(path, map_location=self.device)
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]

    def save(self, state: Path, folder: Path) -> None:
        parts = {"network": self.network, "average": self.average, "optimizer": self.optimizer}
        half = state.with_suffix(".part")
        saved = {name: part.state_dict() for name, part in parts.items()}
        self.torch.save(saved | {"steps": self.steps}, half)
        half.rename(state)
        # In bf16, which halves the file; the running average itself stays as it is.
        copy.deepcopy(self.average).to(self.torch.bfloat16).save_pretrained(folder / "unet")
        self.scheduler.save_pretrained(folder / "scheduler")
        index = {
            "_class_name": "DDPMPipeline",
            "unet": ["diffusers", "UNet2DModel"],
            "scheduler": ["diffusers", "DDPMScheduler"],
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=2))
        classes = "airplane automobile bird cat deer dog frog horse ship truck".split()
        card = {
            "role": "teacher", "class_names": classes,
            "defaults": {"num_inference_steps": 50, "scheduler": "ddim"},
            "recipe": {"method": "training on images", "data": "CIFAR-10-JPEG", "with": "PyTorch", "steps": self.steps, "batch": self.batch},
        }
        (folder / "understudy.json").write_text(json.dumps(card, indent=2))

    def step(self, learning_rate: float):
        torch = self.torch
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        pick = torch.randint(len(self.images), (self.batch,), device=self.device)
        x = self.images[pick].float() / 127.5 - 1
        mirrored = torch.rand(self.batch, 1, 1, 1, device=self.device) < 0.5
        x = torch.where(mirrored, x.flip(-1), x)
        t = torch.randint(0, 1000, (self.batch,), device=self.device)
        eps, alpha_bar = torch.randn_like(x), self.alpha_bar[t].view(-1, 1, 1, 1)
        noisy = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * eps
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device, dtype=torch.bfloat16):
            answer = self.run(noisy, t, self.labels[pick], return_dict=False)[0]
        loss = (answer.float() - eps).square().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.steps += 1
        decay = min(0.9995, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)
        return loss.detach()


def rates(results: Results, data: Path, options) -> None:
    """Training steps per second, PyTorch's and understudy's, whole programs both."""
    batch, steps = (16, 6) if options.tiny else (options.batch, 200)
    trainer = Trainer(architecture(options), data, batch, options.device, options)
    for _ in range(2 if options.tiny else 20):
        loss = trainer.step(1e-4)
    float(loss)
    began = time.perf_counter()
    for _ in range(steps):
        loss = trainer.step(1e-4)
    float(loss)
    pytorch = (time.perf_counter() - began) / steps
    del trainer
    for dtype in ["auto", "f32"] if options.device != "cpu" else ["auto"]:
        out = WORK / f"rate-{dtype}"
        shutil.rmtree(out, ignore_errors=True)
        command = ["train", "--data", data, "--config", config_file(architecture(options), "teacher.json")]
        command += ["--out", out, "--steps", steps, "--batch", batch, "--sample-every", 0]
        common.run(*command, "--device", options.device, "--dtype", dtype)
        records = [json.loads(line) for line in (out / "training/log.jsonl").read_text().splitlines()]
        # Of the second half: the first steps choose algorithms.
        half = records[len(records) // 2 :]
        ours = (half[-1]["seconds"] - half[0]["seconds"]) / (len(half) - 1)
        results.add(
            training_step=dtype, batch=batch, understudy_seconds=ours, pytorch_seconds=pytorch,
            ratio=pytorch / ours, first_loss=records[0]["loss"], last_loss=records[-1]["loss"],
        )


def teacher(results: Results, data: Path, options) -> None:
    """Trains until the time is over; the learning rate falls over the last third of --total-minutes."""
    batch = 16 if options.tiny else options.batch
    trainer = Trainer(architecture(options), data, batch, options.device, options)
    # Larger than what comes back from some machines, so not among the results.
    state, folder = WORK / "teacher-state.pt", WORK / NAME
    trainer.resume(state)
    spent_file = WORK / "teacher-spent.json"
    spent = json.loads(spent_file.read_text())["seconds"] if spent_file.exists() else 0.0
    total, until = options.total_minutes * 60, options.minutes * 60
    began, smooth, saved = time.monotonic(), None, time.monotonic()
    while (elapsed := time.monotonic() - began) < until:
        done = min(1.0, (spent + elapsed) / total)
        rate = 6e-4 * min(1, (trainer.steps + 1) / 500) * (1 if done < 0.67 else max(0.02, (1 - done) / 0.33))
        loss = trainer.step(rate)
        if trainer.steps % (5 if options.tiny else 200) == 0:
            value = float(loss)
            if not value == value:
                raise SystemExit(f"the loss is {value} at step {trainer.steps}")
            smooth = value if smooth is None else 0.9 * smooth + 0.1 * value
            results.add(step=trainer.steps, loss=smooth, learning_rate=rate)
        if time.monotonic() - saved > 60:
            trainer.save(state, folder)
            spent_file.write_text(json.dumps({"seconds": spent + time.monotonic() - began}))
            saved = time.monotonic()
    trainer.save(state, folder)
    spent_file.write_text(json.dumps({"seconds": spent + time.monotonic() - began}))
    results.add(teacher=NAME, steps=trainer.steps, images=trainer.steps * batch, loss=smooth, bytes=common.keep(folder))
    common.run("sample", "--model", folder, "--n", 4 if options.tiny else 64, "--steps", 3 if options.tiny else 50, "--out", OUT / "teacher-samples.png", "--device", options.device)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--eager", action="store_true", help="do not compile PyTorch's network")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--minutes", type=float, default=5.0, help="of this call's teacher")
    parser.add_argument("--total-minutes", type=float, default=5.0, help="of all calls together")
    parser.add_argument("--only", choices=["rates", "teacher"])
    options = parser.parse_args()
    results = Results("train")
    common.describe(results, options.device)
    data = common.cifar("train")
    if data is None:
        raise SystemExit("the bundle has no CIFAR-10-JPEG; give prepare.sh CIFAR10_JPEG")
    if options.only != "teacher":
        rates(results, data, options)
    if options.only != "rates":
        teacher(results, data, options)
    results.end()


if __name__ == "__main__":
    main()
