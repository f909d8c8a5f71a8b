"""DKDM on the GPU: an iteration beside PyTorch's, then a student, distilled for as long as is left, to be gone
on with by the same command; teacher and student side by side."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import common
from common import BUNDLE, OUT, STUDENT, TINY, UNDERSTUDY, WORK, Results
from train import NAME, config_file

FASHION = "fashion-mnist"


def pair(options) -> tuple[Path, Path]:
    """The teacher trained before, if there is one, and an architecture for its student; else the zoo's."""
    trained = common.kept(NAME)
    if trained and not options.zoo:
        return trained, config_file(TINY if options.tiny else STUDENT, "student.json")
    return BUNDLE / f"models/{FASHION}-teacher", BUNDLE / f"models/{FASHION}-student/unet/config.json"


def command(teacher: Path, student: Path, out: Path, steps: int, options) -> list:
    words = ["distill", "--teacher", teacher, "--student", student, "--out", out, "--steps", steps]
    batch, rho = (8, 0.005) if options.tiny else (options.batch, options.rho)
    words += ["--batch", batch, "--rho", rho, "--walk-steps", 10 if options.tiny else 50]
    return words + ["--device", options.device, "--learning-rate", 5e-4, "--sample-every", 0]


def pytorch_iteration(teacher: Path, student: Path, batch: int, options) -> float:
    """Seconds of the teacher's evaluation and the student's training step, compiled, bf16."""
    import torch
    from diffusers import UNet2DModel

    device = "cuda" if options.device.startswith("cuda") else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    learned_from = common.load_network(teacher).to(device, dtype).to(memory_format=torch.channels_last)
    config = json.loads(student.read_text())
    learner = UNet2DModel.from_config(config).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=5e-4, fused=device == "cuda")
    asked, answered = (one if options.eager else torch.compile(one) for one in [learned_from, learner])
    size, channels = config["sample_size"], config["in_channels"]
    x = torch.randn(batch, channels, size, size, device=device).to(memory_format=torch.channels_last)
    classes = config.get("num_class_embeds")

    def iteration() -> None:
        times = torch.randint(0, 1000, (batch,), device=device)
        labels = torch.randint(0, classes, (batch,), device=device) if classes else None
        with torch.no_grad():
            target = asked(x.to(dtype), times, labels, return_dict=False)[0].float()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            answer = answered(x, times, labels, return_dict=False)[0]
        loss = (answer.float() - target).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(2 if options.tiny else 20):
        iteration()
    finish()
    count = 3 if options.tiny else 200
    began = time.perf_counter()
    for _ in range(count):
        iteration()
    finish()
    return (time.perf_counter() - began) / count


def iterations(results: Results, options) -> None:
    teacher, student = pair(options)
    out, steps = WORK / "distil-rate", 8 if options.tiny else 300
    shutil.rmtree(out, ignore_errors=True)
    words = command(teacher, student, out, steps, options)
    words[words.index("--rho") + 1] = 0.002
    common.run(*words)
    records = [json.loads(line) for line in (out / "training/log.jsonl").read_text().splitlines()]
    half = records[len(records) // 2 :]
    ours = (half[-1]["seconds"] - half[0]["seconds"]) / (len(half) - 1)
    batch = 8 if options.tiny else options.batch
    theirs = pytorch_iteration(teacher, student, batch, options)
    results.add(
        iteration=teacher.name, batch=batch, understudy_seconds=ours, pytorch_seconds=theirs, ratio=theirs / ours,
        first_loss=records[0]["loss"], last_loss=records[-1]["loss"],
    )


def student(results: Results, options) -> None:
    """Goes on until the time is over; killed, the next call goes on from the last checkpoint."""
    teacher, architecture = pair(options)
    out = WORK / f"{teacher.name.removesuffix('-teacher')}-student"
    words = [UNDERSTUDY, *command(teacher, architecture, out, options.steps, options)]
    words += ["--checkpoint-every", 2 if options.tiny else 250]
    process = subprocess.Popen([str(word) for word in words], stderr=subprocess.DEVNULL)
    log, seen, began = out / "training/log.jsonl", 0, time.monotonic()
    while process.poll() is None and time.monotonic() - began < options.minutes * 60:
        time.sleep(1 if options.tiny else 10)
        lines = log.read_text().splitlines() if log.exists() else []
        if len(lines) > seen:
            seen = len(lines)
            try:
                last = json.loads(lines[-1])
            except json.JSONDecodeError:
                continue
            results.add(step=last["step"], loss=last["loss"], images_per_second=last["images_per_second"])
    if process.poll() is None:
        process.terminate()
        process.wait()
        results.add(student="not finished: the same command goes on from its checkpoint", out=out.name)
        return
    if process.returncode != 0:
        raise SystemExit(f"distill ended with {process.returncode}: {' '.join(map(str, words))}")
    results.add(student=out.name, finished=True, bytes=common.keep(out))
    dtype = "auto"
    for batch in [1, 2] if options.tiny else [1, 16, 64, 256]:
        ms = [common.bench(folder, batch, options.device, dtype, 1)["ms_per_image_evaluation"] for folder in [teacher, out]]
        results.add(speed_up=ms[0] / ms[1], batch=batch, teacher_ms=ms[0], student_ms=ms[1])
    for folder in [teacher, out]:
        picture = OUT / f"{folder.name}-samples.png"
        common.run("sample", "--model", folder, "--n", 4 if options.tiny else 64, "--steps", 3 if options.tiny else 50, "--out", picture, "--device", options.device)


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--eager", action="store_true", help="do not compile PyTorch's networks")
    parser.add_argument("--zoo", action="store_true", help="the bundled teacher, even where one was trained")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rho", type=float, default=0.02)
    parser.add_argument("--steps", type=int, default=20_000, help="of the student in all; keep them when going on")
    parser.add_argument("--minutes", type=float, default=6.0, help="of this call's distillation")
    parser.add_argument("--only", choices=["iterations", "student"])
    options = parser.parse_args()
    results = Results("distil")
    common.describe(results, options.device)
    if options.only != "student":
        iterations(results, options)
    if options.only != "iterations":
        student(results, options)
    results.end()


if __name__ == "__main__":
    main()
