"""What the phases share: where things are, the results file, understudy as a user runs it, and networks."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tarfile
import time
import urllib.request
from pathlib import Path

BUNDLE = Path(os.environ.get("BUNDLE", Path(__file__).resolve().parent))
OUT = Path(os.environ.get("OUT", BUNDLE / "results"))
WORK = Path(os.environ.get("WORK", "/tmp/understudy-gpu"))
UNDERSTUDY = os.environ.get("UNDERSTUDY", str(WORK / "understudy"))
BEGAN = time.monotonic()


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu to try the phase itself out")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that the phase runs")
    return parser


class Results:
    """One JSON object per line, on disk as soon as it is known."""

    def __init__(self, phase: str) -> None:
        OUT.mkdir(parents=True, exist_ok=True)
        self.file = (OUT / f"{phase}.jsonl").open("a")
        self.failed = 0

    def add(self, **entry: object) -> None:
        entry = {"seconds_in": round(time.monotonic() - BEGAN, 1)} | entry
        print(json.dumps(entry), flush=True)
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()

    def judge(self, what: str, value: float, limit: float, at_least: bool = False, **more: object) -> None:
        """Holds a figure against a limit; NaN never passes."""
        good = value >= limit if at_least else value <= limit
        self.failed += not good
        sign = ">=" if at_least else "<="
        self.add(check=what, value=value, limit=f"{sign} {limit}", good=bool(good), **more)

    def end(self) -> None:
        self.add(end=True, failed=self.failed)
        raise SystemExit(1 if self.failed else 0)


def describe(results: Results, device: str) -> None:
    """Which machine this was."""
    import torch

    about = {"torch": torch.__version__, "understudy": run("--version").stdout.strip()}
    if torch.cuda.is_available():
        about |= {"gpu": torch.cuda.get_device_name(0), "cuda": torch.version.cuda}
        about["cudnn"] = torch.backends.cudnn.version()
    else:
        about["gpu"] = "emulated" if device.startswith("cuda") else "none"
    if (BUNDLE / "ABOUT").exists():
        about["bundle"] = (BUNDLE / "ABOUT").read_text().split("\n")[0]
    results.add(machine=about)


def run(*command: object, timeout: float | None = None) -> subprocess.CompletedProcess:
    """understudy, to its end; its own words when it fails."""
    words = [UNDERSTUDY, *(str(word) for word in command)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}\n{done.stderr[-4000:]}")
    return done


def bench(model: Path, batch: int, device: str, dtype: str, seconds: int) -> dict:
    command = ["bench", "--json", "--model", model, "--batch", batch, "--device", device]
    command += ["--dtype", dtype, "--seconds", seconds, "--steps", 10]
    return json.loads(run(*command).stdout)


class Server:
    """`understudy serve` on any free port, until the `with` block ends."""

    def __init__(self, models: Path, device: str, dtype: str, *more: object) -> None:
        words = [UNDERSTUDY, "serve", "--port", 0, "--models", models, "--device", device]
        words += ["--dtype", dtype, "--max-queue", 1024, "--max-images-per-request", 64, *more]
        self.process = subprocess.Popen(
            [str(word) for word in words],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"RUST_LOG": "warn"},
        )
        for line in self.process.stdout:
            if line.startswith("Understudy serves on "):
                self.url = line.split()[3]
            if line.startswith("Ready after "):
                return
        raise RuntimeError(f"the server does not start on {device} in {dtype}; its reason is above")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()

    def post(self, path: str, headers: dict, body: bytes) -> tuple[dict, bytes]:
        request = urllib.request.Request(self.url + path, data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=300) as reply:
                return dict(reply.headers.items()), reply.read()
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.code} {error.read().decode()[:2000]}") from error

    def evaluate(self, model: str, inputs: dict):
        """One raw evaluation over the Open Inference Protocol's binary extension."""
        import numpy

        names = {"float32": "FP32", "int64": "INT64"}
        blobs = {name: array.tobytes() for name, array in inputs.items()}
        described = [
            {
                "name": name,
                "datatype": names[str(array.dtype)],
                "shape": list(array.shape),
                "parameters": {"binary_data_size": len(blobs[name])},
            }
            for name, array in inputs.items()
        ]
        output = {"name": "noise_pred", "parameters": {"binary_data": True}}
        header = json.dumps({"inputs": described, "outputs": [output]}).encode()
        headers = {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(len(header)),
        }
        told, data = self.post(f"/v2/models/{model}/infer", headers, header + b"".join(blobs.values()))
        told = {name.lower(): value for name, value in told.items()}
        length = int(told["inference-header-content-length"])
        shape = json.loads(data[:length])["outputs"][0]["shape"]
        return numpy.frombuffer(data[length:], numpy.float32).reshape(shape)

    def images(self, model: str, n: int, seed: int, steps: int, **more) -> list[bytes]:
        """PNG files, deterministic DDIM; `more` fields of the request."""
        import base64

        request = {"model": model, "n": n, "seed": seed, "num_inference_steps": steps, "scheduler": "ddim"} | more
        headers = {"Content-Type": "application/json"}
        _, data = self.post("/v1/images/generations", headers, json.dumps(request).encode())
        return [base64.b64decode(one["b64_json"]) for one in json.loads(data)["data"]]

    def metrics(self) -> dict[str, float]:
        with urllib.request.urlopen(self.url + "/metrics", timeout=30) as reply:
            lines = reply.read().decode().splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in samples}


def pixels(png: bytes):
    import io

    import numpy
    from PIL import Image

    return numpy.asarray(Image.open(io.BytesIO(png))).astype(float)


def psnr(one, other) -> float:
    """In dB of 8-bit images, capped at 100."""
    import math

    error = ((one - other) ** 2).mean()
    return 100.0 if error == 0 else float(10 * math.log10(255**2 / error))


def write_folder(folder: Path, config: dict, seed: int, scheduler: dict | None = None) -> None:
    """A model folder with random weights, of which none is an identity that would hide a mistake."""
    import torch
    from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DModel

    torch.manual_seed(seed)
    part, family = ("transformer", DiTTransformer2DModel) if "num_layers" in config else ("unet", UNet2DModel)
    network = family(**config)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim == 1 and name.endswith("weight"):
                weight.normal_(1.0, 0.1)
            elif not weight.any() or name.endswith("bias"):
                weight.normal_(0.0, 0.1)
    network.save_pretrained(folder / part)
    DDPMScheduler(**(scheduler or {})).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DiTPipeline" if part == "transformer" else "DDPMPipeline",
        part: ["diffusers", family.__name__],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def keep(folder: Path) -> int:
    """Puts a model folder among the results as one file, without what belongs to its training; its bytes."""
    kept = OUT / f"{folder.name}.tar"
    with tarfile.open(kept, "w") as tar:
        mine = lambda member: None if "/training" in member.name else member
        tar.add(folder, folder.name, filter=mine)
    return kept.stat().st_size


def kept(name: str) -> Path | None:
    """A model that was kept before: on this machine, or carried to it beside the bundle's files."""
    folder = WORK / name
    if not folder.exists() and (BUNDLE / f"{name}.tar").exists():
        with tarfile.open(BUNDLE / f"{name}.tar") as tar:
            tar.extractall(WORK, filter="data")
    return folder if (folder / "model_index.json").exists() else None


def load_network(folder: Path):
    from diffusers import DiTTransformer2DModel, UNet2DModel

    part = next(part for part in ["unet", "transformer"] if (folder / part).exists())
    family = UNet2DModel if part == "unet" else DiTTransformer2DModel
    return family.from_pretrained(folder / part, low_cpu_mem_usage=False).eval().requires_grad_(False)


def cifar(part: str) -> Path | None:
    """CIFAR-10-JPEG as a plain tar, or nothing where the bundle has none."""
    import lzma
    import shutil

    packed, plain = BUNDLE / f"data/cifar10-jpeg-{part}.tar.xz", WORK / f"cifar10-jpeg-{part}.tar"
    if not plain.exists() and packed.exists():
        half = plain.with_suffix(".part")
        with lzma.open(packed) as source, half.open("wb") as target:
            shutil.copyfileobj(source, target)
        half.rename(plain)
    return plain if plain.exists() else None


def cifar_tensors(path: Path, limit: int | None = None):
    """uint8 `[N, 3, 32, 32]` and class numbers `[N]`, classes by name."""
    import io

    import numpy
    import torch
    from PIL import Image

    names, images, labels = [], [], []
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile() and (limit is None or len(images) < limit):
                images.append(numpy.asarray(Image.open(io.BytesIO(tar.extractfile(member).read()))))
                names.append(member.name.split("/")[-2])
    order = sorted(set(names))
    labels = [order.index(name) for name in names]
    return torch.from_numpy(numpy.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


# At most 5 million parameters for the teacher and 1.5 for the student, which differ in width alone.
TEACHER = {
    "sample_size": 32, "in_channels": 3, "out_channels": 3, "layers_per_block": 2,
    "block_out_channels": (64, 96, 128), "norm_num_groups": 16, "attention_head_dim": 32,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"), "num_class_embeds": 10,
}
STUDENT = TEACHER | {"block_out_channels": (32, 48, 64), "attention_head_dim": 16, "norm_num_groups": 8}
TINY = TEACHER | {
    "layers_per_block": 1, "block_out_channels": (16, 16, 32), "norm_num_groups": 4, "attention_head_dim": 8,
}
COSINE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
