"""Reads a finished run with the real packages: TensorBoard its events, diffusers its model.

    pip install tensorboard diffusers torch numpy
    python distill/tests/clients/check_run.py OUT [--steps 20] [--server http://127.0.0.1:8080]

Fails unless TensorBoard's scalars are those of `log.jsonl`, and unless diffusers loads the model strictly
and samples finite images of its size; with a server, unless its network and diffusers' agree at several
times.
"""

import argparse
import functools
import json
import urllib.request
from pathlib import Path


def events(training):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(training), size_guidance={"scalars": 0}).Reload()
    log = {}
    for line in (training / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        log[record["step"]] = record
    tags = {"loss/total": "loss", "loss/simple": "simple", "learning_rate": "learning_rate",
            "gradient_norm": "gradient_norm"}
    points = 0
    for tag, field in tags.items():
        scalars = accumulator.Scalars(tag)
        steps = [scalar.step for scalar in scalars]
        assert steps == sorted(set(steps)), f"{tag}: steps {steps}"
        expected = [step for step in log if step == 1 or step % 10 == 0]
        assert steps == expected, f"{tag}: TensorBoard has {steps}, the log {expected}"
        for scalar in scalars:
            value = log[scalar.step][field]
            assert abs(scalar.value - value) <= 1e-6 * abs(value), f"{tag} {scalar.step}"
            points += 1
    print(f"TensorBoard reads {points} points of {len(tags)} tags, as in log.jsonl")


def answer(server, name, x, t, labels):
    """What the server's own network says: one evaluation over the Open Inference Protocol."""
    import torch

    def tensor(name, kind, values):
        return {"name": name, "datatype": kind, "shape": list(values.shape), "data": values.flatten().tolist()}

    inputs = [tensor("sample", "FP32", x), tensor("timestep", "INT64", torch.full((len(x),), int(t)))]
    if labels is not None:
        inputs.append(tensor("class_labels", "INT64", labels))
    request = urllib.request.Request(
        f"{server}/v2/models/{name}/infer", json.dumps({"inputs": inputs}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as reply:
        output = json.load(reply)["outputs"][0]
    return torch.tensor(output["data"]).reshape(output["shape"])


def agree(server, name, network, x, t, labels):
    """The two answers' largest difference, relative to the largest value; at most 1e-5."""
    theirs = network(x, t, labels)
    error = ((answer(server, name, x, t, labels) - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= 1e-5, f"t = {t}: relative difference {error:.2e}"
    return error


def unet(out):
    """A U-Net: the pipeline that its folder names samples from it."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(out)
    network = pipeline.unet
    classes = network.config.num_class_embeds

    def sample(steps, labels):
        # The pipeline has no argument for classes.
        network.forward = functools.partial(type(network).forward, network, class_labels=labels)
        images = pipeline(batch_size=4, num_inference_steps=steps, output_type="np").images
        del network.forward
        return images

    return network, classes, sample, type(pipeline).__name__


def dit(out):
    """A transformer: diffusers' pipeline for it wants an autoencoder as well, so its scheduler is asked
    by hand; the pipeline must load all the same."""
    import torch
    from diffusers import DiTPipeline, DiTTransformer2DModel

    pipeline = DiTPipeline.from_pretrained(out, vae=None)
    network = DiTTransformer2DModel.from_pretrained(out, subfolder="transformer")
    scheduler, config = pipeline.scheduler, network.config
    # The table has one row more, which is the only one where there are no classes.
    classes = config.num_embeds_ada_norm + 1 if config.num_embeds_ada_norm else None

    def sample(steps, labels):
        scheduler.set_timesteps(steps)
        labels = torch.zeros(4, dtype=torch.long) if labels is None else labels
        x = torch.randn(4, config.in_channels, config.sample_size, config.sample_size,
                        generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            noise = network(x, t.expand(4), class_labels=labels).sample[:, : x.shape[1]]
            x = scheduler.step(noise, t, x).prev_sample
        return ((x + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).numpy()

    return network, classes, sample, "its scheduler"


def model(out, steps, server):
    import numpy
    import torch

    is_dit = (out / "transformer").is_dir()
    network, classes, sample, by = (dit if is_dit else unet)(out)
    labels = torch.arange(4) % classes if classes else None
    with torch.no_grad():
        images = sample(steps, labels)
        size = network.config.sample_size
        assert images.shape[:3] == (4, size, size), images.shape
        assert numpy.isfinite(images).all() and images.std() > 0.02, images.std()
        print(f"diffusers loads {out} and samples {images.shape} in {steps} steps by {by}")
        if server is None:
            return

        def forward(x, t, labels):
            if is_dit and labels is None:
                labels = torch.zeros(len(x), dtype=torch.long)
            return network(x, torch.full((len(x),), int(t)), class_labels=labels).sample

        x = torch.randn(4, network.config.in_channels, size, size, generator=torch.Generator().manual_seed(1))
        worst = max(agree(server, out.name, forward, x, t, labels) for t in (0, 1, 250, 500, 999))
        print(f"Understudy and diffusers agree per evaluation: {worst:.1e} at most")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--server", help="http://HOST:PORT of `understudy serve --models` and OUT's parent")
    arguments = parser.parse_args()
    events(arguments.out / "training")
    model(arguments.out, arguments.steps, arguments.server)


main()
