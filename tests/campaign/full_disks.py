"""A small file system at every write: the command says so and keeps what it had; with room again it goes on."""

import contextlib
import os
import subprocess

from kills import same

STEPS = 4
KIBIBYTE = 1024


def cases(world):
    if os.getuid() != 0:
        raise RuntimeError("mounting a small file system needs root")
    made = []
    for kind, arguments in [("train", world.train_arguments), ("distill", world.distill_arguments)]:
        reference = world.folder_for("reference") / "out"
        world.run(*arguments(reference, STEPS), seconds=60).worked()
        size = sum(path.stat().st_size for path in reference.rglob("*") if path.is_file())
        # Pages of 4 KiB, and room for one more of everything that is written beside what it replaces.
        for kib in range(4, 3 * size // KIBIBYTE, max(4, size // KIBIBYTE // 12 // 4 * 4)):
            made.append((f"{kind} in {kib} KiB", lambda a=arguments, r=reference, k=kib: run_in(world, a, r, k)))
    made += [
        ("experiments on a full disk", lambda: experiments(world)),
        ("a vote into a data folder that was removed", lambda: removed_folder(world)),
        ("distill with a pool file that has no room", lambda: pool(world)),
    ]
    for kib in (4, 8, 64):
        for name, arguments in commands(world):
            made.append((f"{name} in {kib} KiB", lambda a=arguments, k=kib: command_in(world, a, k)))
    world.random.shuffle(made)
    yield from made


@contextlib.contextmanager
def small(world, kib):
    folder = world.folder_for("small")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def enlarge(folder):
    subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)


def run_in(world, arguments, reference, kib):
    with small(world, kib) as folder:
        ended = world.run(*arguments(folder / "out", STEPS), seconds=60).unharmed()
        if ended.code != 0:
            assert "No space left" in ended.said and str(folder) in ended.said, ended.said
            assert not (folder / "out/model_index.json").exists(), "half a model is published"
            left = [path.name for path in folder.rglob("*") if "partial" in path.name or ".tmp" in path.name]
            assert not left, f"left behind: {left}"
        enlarge(folder)
        world.run(*arguments(folder / "out", STEPS), seconds=60).worked()
        same(reference, folder / "out")


def commands(world):
    evaluate = ["evaluate", "--samples", world.samples, "--reference", world.samples]
    yield "sample", lambda out: ["sample", "--model", world.models / "teacher", "--n", 40, "--steps", 1, "--out", out / "x"]
    yield "evaluate --write-stats", lambda out: [*evaluate, "--write-stats", out / "x.npz"]
    yield "train-judge", lambda out: ["train-judge", "--data", world.samples, "--test-data", world.samples, "--out", out / "x", "--epochs", 1, "--least-accuracy", 0]


def command_in(world, arguments, kib):
    with small(world, kib) as folder:
        ended = world.run(*arguments(folder), seconds=30).unharmed()
        assert ended.code == 0 or ("No space left" in ended.said and str(folder) in ended.said), ended.said
        left = [path.name for path in folder.rglob("*") if "partial" in path.name or ".tmp" in path.name]
        assert not left, f"left behind: {left}"


def pool(world):
    with small(world, 4) as folder:
        (folder / "filler").write_bytes(bytes(4096))
        out = world.folder_for("out") / "out"
        world.distill(out, STEPS, "--pool-file", folder / "pool").refused("pool", "No space left")
        assert [path.name for path in folder.iterdir()] == ["filler"], "a pool without room is left behind"


ARMS = {"id": "e", "arms": [{"model": "teacher", "weight": 1}, {"model": "student", "weight": 1}]}


def experiments(world):
    """Every write is answered: kept, or 503 with the remedy; what was acknowledged is there later."""
    with small(world, 4096) as folder:
        with world.serve("--data-dir", folder) as server:
            assert server.post("/v1/experiments", ARMS).status == 201
            filler = open(folder / "filler", "wb")
            with contextlib.suppress(OSError), filler:
                while True:
                    filler.write(bytes(4096))
            kept, statuses = [], set()
            for index in range(40):
                reply = server.post("/v1/experiments", ARMS | {"id": f"e{index}"})
                statuses.add(reply.status)
                if reply.status == 201:
                    kept.append(f"e{index}")
                else:
                    assert reply.status == 503, f"{reply.status} {reply.text()}"
                    assert any(word in reply.text() for word in ("space", "room", "disk")), f"no remedy: {reply.text()}"
            server.lives()
            (folder / "filler").unlink()
            reply = server.post("/v1/experiments", ARMS | {"id": "later"})
            assert reply.status == 201, f"with room again: {reply.status} {reply.text()}; before: {statuses}"
        with world.serve("--data-dir", folder) as server:
            for name in [*kept, "later", "e"]:
                assert server.get(f"/v1/experiments/{name}").status == 200, f"{name} was acknowledged and is gone"


def removed_folder(world):
    data = world.folder_for("data") / "kept"
    with world.serve("--data-dir", data) as server:
        assert server.post("/v1/experiments", ARMS).status == 201
        pair = server.post("/v1/experiments/e/pairs", {"num_inference_steps": 1})
        assert pair.status == 200, pair.text()
        for path in data.iterdir():
            path.unlink()
        data.rmdir()
        vote = {"pair_id": pair.json()["pair_id"], "choice": 0, "idempotency_key": "k"}
        reply = server.post("/v1/experiments/e/votes", vote)
        assert reply.status == 503, f"acknowledged into nothing: {reply.status} {reply.text()}"
