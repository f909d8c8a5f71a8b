"""Speed, in turns with diffusers on PyTorch: bf16, channels_last, torch.compile(mode="max-autotune"); and
through the HTTP server."""

from __future__ import annotations

import shutil
import statistics
import threading
import time
from pathlib import Path

import common
from common import BUNDLE, WORK, Results, Server

BATCHES = [1, 16, 64, 256]
ROUNDS = 3
SECONDS = 3
CIFAR10 = "cifar10-32-random"
# Steps of the images through HTTP.
STEPS = 20


class Peer:
    """diffusers' network on the device, compiled for one batch size."""

    def __init__(self, folder: Path, batch: int, device: str, compiled: bool) -> None:
        import torch

        self.cuda = device.startswith("cuda")
        target, dtype = ("cuda", torch.bfloat16) if self.cuda else ("cpu", torch.float32)
        unet = common.load_network(folder).to(target, dtype).to(memory_format=torch.channels_last)
        config = unet.config
        shape = (batch, config.in_channels, config.sample_size, config.sample_size)
        x = torch.randn(shape, device=target, dtype=dtype).to(memory_format=torch.channels_last)
        times = torch.full((batch,), 999, device=target)
        labels = torch.zeros(batch, dtype=torch.long, device=target) if config.num_class_embeds else None
        run = torch.compile(unet, mode="max-autotune") if compiled else unet
        self.call = lambda: run(x, times, labels, return_dict=False)[0]
        began = time.perf_counter()
        self.seconds(0.0)
        self.compile_seconds = time.perf_counter() - began

    def seconds(self, spend: float) -> float:
        """The median evaluation, by device events after warm-up."""
        import torch

        taken, began = [], time.perf_counter()
        with torch.no_grad():
            for _ in range(5):
                self.call()
            while len(taken) < 5 or time.perf_counter() - began < spend:
                if self.cuda:
                    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    first.record()
                    self.call()
                    last.record()
                    last.synchronize()
                    taken.append(first.elapsed_time(last) / 1e3)
                else:
                    start = time.perf_counter()
                    self.call()
                    taken.append(time.perf_counter() - start)
        return statistics.median(taken)


def networks(results: Results, folders: list[Path], options) -> None:
    """One evaluation. Understudy's time goes by the clock, its input's way to the device and a number's way
    back included; PyTorch's by device events, which leave those out."""
    batches = [1, 2] if options.tiny else options.batches
    rounds, seconds = (1, 1) if options.tiny else (ROUNDS, SECONDS)
    dtype = "bf16" if options.device.startswith("cuda") else "f32"
    for folder in folders:
        for batch in batches:
            peer = Peer(folder, batch, options.device, not options.eager)
            ratios, ours, theirs = [], [], []
            for _ in range(rounds):
                told = common.bench(folder, batch, options.device, dtype, seconds)
                ours.append(told["ms_per_image_evaluation"])
                theirs.append(peer.seconds(seconds) * 1e3 / batch)
                ratios.append(theirs[-1] / ours[-1])
            results.add(
                network=folder.name, batch=batch, dtype=dtype,
                understudy_ms_per_image=statistics.median(ours), pytorch_ms_per_image=statistics.median(theirs),
                ratio=statistics.median(ratios), compile_seconds=round(peer.compile_seconds, 1),
                images_per_second_of_bench=told["images_per_second"],
            )
            del peer


def serving(results: Results, folder: Path, options) -> None:
    """Whole images through HTTP, many clients at once, of what the bare network does at the same batch."""
    alone = WORK / "bench-serving"
    shutil.rmtree(alone, ignore_errors=True)
    shutil.copytree(folder, alone / folder.name)
    clients, n, steps = (2, 1, 3) if options.tiny else (16, 16, STEPS)
    requests = 1 if options.tiny else 4
    with Server(alone, options.device, "auto") as server:
        def client(first: int) -> None:
            for i in range(requests):
                server.images(folder.name, n, first + i * n, steps)

        def run() -> float:
            threads = [threading.Thread(target=client, args=(i * 10_000,)) for i in range(clients)]
            began = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return clients * requests * n / (time.perf_counter() - began)

        run()
        before = server.metrics()
        rate = run()
        after = server.metrics()
    spent = {
        name: after.get(f'understudy_evaluation_duration_seconds_{name}{{model="{folder.name}"}}', 0.0)
        - before.get(f'understudy_evaluation_duration_seconds_{name}{{model="{folder.name}"}}', 0.0)
        for name in ["sum", "count"]
    }
    rows = clients * requests * n * steps
    batch = max(1, round(rows / max(spent["count"], 1)))
    dtype = "bf16" if options.device.startswith("cuda") else "f32"
    bare = common.bench(folder, batch, options.device, dtype, 1 if options.tiny else SECONDS)
    bare_rate = 1e3 / (bare["ms_per_image_evaluation"] * steps)
    results.add(
        serving=folder.name, images_per_second=rate, mean_batch=rows / max(spent["count"], 1),
        bare_images_per_second=bare_rate, of_the_bare_network=rate / bare_rate, steps=steps,
        clients=clients, images_per_request=n, device_share=spent["sum"] * rate / (clients * requests * n),
    )


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--eager", action="store_true", help="do not compile PyTorch's network")
    parser.add_argument("--only", choices=["serving", "cifar10", "zoo"], help="a part: compiling takes minutes")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    options = parser.parse_args()
    results = Results("bench")
    common.describe(results, options.device)
    import torch

    torch.backends.cudnn.benchmark = True
    models = WORK / "bench-models"
    shutil.rmtree(models, ignore_errors=True)
    if options.tiny:
        common.write_folder(models / CIFAR10, common.TINY, 0)
    else:
        from networks import write_random_cifar10

        (models / CIFAR10).mkdir(parents=True)
        write_random_cifar10(models / CIFAR10)
    zoo = [BUNDLE / "models" / f"fashion-mnist-{one}" for one in ["teacher", "student"]]
    if options.only in (None, "serving"):
        serving(results, zoo[0], options)
        serving(results, models / CIFAR10, options)
    if options.only in (None, "cifar10"):
        networks(results, [models / CIFAR10], options)
    if options.only in (None, "zoo"):
        # Small networks are bound by launches: at batch 1 the student may be no faster than its teacher.
        networks(results, zoo, options)
    results.end()


if __name__ == "__main__":
    main()
