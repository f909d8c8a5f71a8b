"""Understudy, as a user runs it: the `bench` command and the server."""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from email.message import Message
from pathlib import Path

import numpy
import torch


class Unsupported(Exception):
    """This build does not compute in this precision."""


def bench(
    binary: Path, folder: Path, batch: int, precision: str, threads: int, seconds: int
) -> dict:
    """`understudy bench --json`; the whole images are another measurement's business."""
    command = [binary, "bench", "--json", "--model", folder, "--batch", batch, "--dtype", precision]
    command += ["--threads", threads, "--seconds", seconds, "--steps", 1]
    done = subprocess.run([str(one) for one in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise Unsupported(done.stderr.strip())
    return json.loads(done.stdout)


class Server:
    """`understudy serve` on any free port, until the `with` block ends."""

    def __init__(self, binary: Path, models: Path, precision: str, threads: int) -> None:
        command = [binary, "serve", "--port", 0, "--models", models, "--dtype", precision]
        command += ["--threads", threads, "--max-images-per-request", 64]
        self.process = subprocess.Popen(
            [str(one) for one in command],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"RUST_LOG": "warn"},
        )
        for line in self.process.stdout:
            if line.startswith("Understudy serves on "):
                self.url = line.split()[3]
            if line.startswith("Ready after "):
                return
        raise Unsupported(f"the server does not start with --dtype {precision}")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait()

    def evaluate(self, model: str, inputs: tuple[torch.Tensor, ...]) -> numpy.ndarray:
        """One raw evaluation over the Open Inference Protocol's binary extension."""
        names = ["sample", "timestep", "class_labels"]
        blobs = [one.contiguous().numpy().tobytes() for one in inputs]
        described = [
            {
                "name": name,
                "datatype": "FP32" if one.is_floating_point() else "INT64",
                "shape": list(one.shape),
                "parameters": {"binary_data_size": len(blob)},
            }
            for name, one, blob in zip(names, inputs, blobs)
        ]
        output = {"name": "noise_pred", "parameters": {"binary_data": True}}
        header = json.dumps({"inputs": described, "outputs": [output]}).encode()
        headers = {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(len(header)),
        }
        reply, data = self._post(f"/v2/models/{model}/infer", headers, header + b"".join(blobs))
        length = int(reply["Inference-Header-Content-Length"])
        shape = json.loads(data[:length])["outputs"][0]["shape"]
        return numpy.frombuffer(data[length:], numpy.float32).reshape(shape)

    def images(self, model: str, n: int, steps: int) -> None:
        """One request for PNG files, deterministic DDIM."""
        request = {"model": model, "n": n, "num_inference_steps": steps, "scheduler": "ddim"}
        headers = {"Content-Type": "application/json"}
        _, data = self._post("/v1/images/generations", headers, json.dumps(request).encode())
        assert len(json.loads(data)["data"]) == n

    def _post(self, path: str, headers: dict, body: bytes) -> tuple[Message, bytes]:
        request = urllib.request.Request(self.url + path, data=body, headers=headers)
        with urllib.request.urlopen(request, timeout=600) as reply:
            return reply.headers, reply.read()
