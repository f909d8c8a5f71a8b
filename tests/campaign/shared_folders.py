"""Two processes on one folder or one file: one has it, the other is refused with the first one's id, and a crash frees it."""

import contextlib
import json
import signal
import subprocess
import time

from kills import curve
from world import WEIGHTS, files

STEPS = 40
MANY = 1_000_000


def cases(world):
    made = []
    for kind, arguments in [("train", world.train_arguments), ("distill", world.distill_arguments)]:
        for delay in (0, 0.05, 0.3, 0.7):
            made.append((f"{kind} twice, {delay} s apart", lambda a=arguments, d=delay: twice(world, a, d)))
        made.append((f"{kind}: refused with the first one's id", lambda a=arguments: refused(world, a)))
        made.append((f"{kind}: free after kill -9", lambda a=arguments: freed(world, a)))
    made += [
        ("distill: one pool file for two runs", lambda: one_pool(world)),
        ("distill: a pool file is free after kill -9", lambda: pool_freed(world)),
        ("train and distill in one folder", lambda: of_two_kinds(world)),
        ("train-judge twice", lambda: judges(world)),
        ("serve twice on one data folder", lambda: servers(world)),
        ("evaluate --out twice", lambda: reports(world)),
    ]
    world.random.shuffle(made)
    yield from made


@contextlib.contextmanager
def started(world, arguments):
    """A command under way, and what it says in a file."""
    log = world.folder_for("log") / "log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            world.command(*arguments), stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=world.environment(), cwd=world.folder
        )
    try:
        yield process, log
    finally:
        process.kill()
        process.wait()


def twice(world, arguments, delay):
    reference = world.folder_for("reference") / "out"
    world.run(*arguments(reference, STEPS), seconds=60).worked()
    out = world.folder_for("shared") / "out"
    with started(world, arguments(out, STEPS)) as (first, log):
        time.sleep(delay)
        second = world.run(*arguments(out, STEPS), seconds=60)
        first.wait(60)
        codes = sorted([first.returncode, second.code])
        said = log.read_text(errors="replace") + second.said
    # Whoever comes when the other is done finds a finished run, which is no fault.
    assert codes in ([0, 1], [0, 0]), f"{codes}: {said}"
    assert "panicked" not in said and "No such file" not in said and "File exists" not in said, said
    assert (out / WEIGHTS).read_bytes() == (reference / WEIGHTS).read_bytes(), "other weights"
    assert curve(out) == curve(reference), "the log has lines too many or too few"
    assert files(out) == files(reference), f"{files(out) ^ files(reference)}"


def under_way(process, log, path):
    end = time.monotonic() + 20
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, log.read_text(errors="replace")
        time.sleep(0.02)


def refused(world, arguments):
    out = world.folder_for("shared") / "out"
    with started(world, arguments(out, MANY)) as (first, log):
        under_way(first, log, out / "training/checkpoint.safetensors")
        ended = world.run(*arguments(out, MANY)).refused(str(first.pid), "out")
        assert first.poll() is None, f"the first one ended: {log.read_text(errors='replace')} {ended.said}"


def freed(world, arguments):
    out = world.folder_for("shared") / "out"
    with started(world, arguments(out, MANY)) as (first, log):
        under_way(first, log, out / "training/checkpoint.safetensors")
        first.send_signal(signal.SIGKILL)
        first.wait()
    steps = len(curve(out)) + 2
    world.run(*arguments(out, steps), seconds=60).worked()


def one_pool(world):
    folder = world.folder_for("pool")
    with started(world, world.distill_arguments(folder / "a", MANY, "--pool-file", folder / "pool")) as (first, log):
        under_way(first, log, folder / "a/training/checkpoint.safetensors")
        world.distill(folder / "b", 4, "--pool-file", folder / "pool").refused(str(first.pid), "pool")
        assert first.poll() is None, f"the first one ended: {log.read_text(errors='replace')}"


def pool_freed(world):
    folder = world.folder_for("pool")
    arguments = lambda steps: world.distill_arguments(folder / "a", steps, "--pool-file", folder / "pool")  # noqa: E731
    with started(world, arguments(MANY)) as (first, log):
        under_way(first, log, folder / "a/training/checkpoint.safetensors")
        first.send_signal(signal.SIGKILL)
        first.wait()
    world.run(*arguments(len(curve(folder / "a")) + 2), seconds=60).worked()


def of_two_kinds(world):
    out = world.folder_for("shared") / "out"
    with started(world, world.train_arguments(out, MANY)) as (first, log):
        under_way(first, log, out / "training/checkpoint.safetensors")
        world.distill(out, 4).refused("out")
        assert first.poll() is None, log.read_text(errors="replace")


def judges(world):
    out = world.folder_for("judge") / "judge"
    arguments = ["train-judge", "--data", world.samples, "--test-data", world.samples, "--out", out, "--epochs", 5, "--least-accuracy", 0]
    with started(world, arguments) as (first, log):
        second = world.run(*arguments, seconds=60)
        first.wait(60)
        assert sorted([first.returncode, second.code]) in ([0, 0], [0, 1]), log.read_text(errors="replace") + second.said
    json.loads((out / "config.json").read_text())
    left = {path.name for path in out.parent.iterdir()}
    assert left == {"judge"}, left


def servers(world):
    data = world.folder_for("data")
    with world.serve("--data-dir", data) as server:
        begun = server.post("/v1/experiments", {"id": "e", "arms": [{"model": "teacher", "weight": 1}, {"model": "student", "weight": 1}]})
        assert begun.status == 201, begun.text()
        world.run("serve", "--port", 0, "--models", world.models, "--data-dir", data).refused("data-dir")
        server.lives()
    with world.serve("--data-dir", data) as server:
        assert server.get("/v1/experiments/e").status == 200, "free after kill -9, with what was kept"


def reports(world):
    out = world.folder_for("report") / "scores.json"
    arguments = ["evaluate", "--samples", world.samples, "--reference", world.samples, "--out", out]
    with started(world, arguments) as (first, _):
        world.run(*arguments, seconds=30).worked()
        assert first.wait(30) == 0
    json.loads(out.read_text())
    assert [path.name for path in out.parent.iterdir()] == ["scores.json"]
