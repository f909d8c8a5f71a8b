"""Killed at every fsync, rename, mkdir and unlink of a run, the same command goes on: the same bytes, and no other file.

`kill.c` is preloaded and ends the process at its k-th such call, before or after it; in a name space of process ids, too,
where every run is process 1.
"""

import json
import os
import shutil
import stat
import subprocess

from world import WEIGHTS, files

STEPS = 4


def cases(world):
    shim = build(world)
    inside = namespace()
    made = []
    for kind, arguments in [("train", world.train_arguments), ("distill", world.distill_arguments)]:
        reference = world.folder_for("reference") / "out"
        count = world.folder_for("count") / "calls"
        world.run(*arguments(reference, STEPS), seconds=60, LD_PRELOAD=shim, KILL_COUNT=count).worked()
        calls = count.stat().st_size
        yield f"{kind}: its calls are seen", lambda calls=calls: check_calls(calls)
        for at in range(1, calls + 1):
            for after in (False, True):
                for before in [(), inside] if inside else [()]:
                    where = "as process 1, " if before else ""
                    name = f"{kind}: {where}killed {'after' if after else 'before'} call {at} of {calls}"
                    made.append((name, lambda a=arguments, r=reference, at=at, after=after, before=before: killed(world, shim, a, r, at, after, before)))
        for at in (1, 2, 3, 5, 8):
            made.append((f"{kind}: given again when it was finished, killed at call {at}", lambda a=arguments, r=reference, at=at: again(world, shim, a, r, at)))
    world.random.shuffle(made)
    yield from made


def build(world):
    shim = world.folder / "kill.so"
    source = os.path.join(os.path.dirname(__file__), "kill.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, source, "-ldl"], check=True, capture_output=True)
    return shim


def namespace():
    """The command that runs another as process 1, where that may be done here."""
    command = ("unshare", "--pid", "--fork", "--kill-child")
    return command if subprocess.run([*command, "true"], capture_output=True).returncode == 0 else ()


def check_calls(calls):
    # A checkpoint alone is a file synced, renamed, its folder synced.
    assert calls >= 6, f"{calls} calls: the program does not call them through the C library"


def killed(world, shim, arguments, reference, at, after, before):
    out = world.folder_for("killed") / "out"
    how = {"LD_PRELOAD": shim, "KILL_AT": at} | ({"KILL_AFTER": 1} if after else {})
    ended = world.run(*arguments(out, STEPS), seconds=60, before=before, **how)
    assert ended.code == 137, f"was not killed: {ended.code} {ended.said}"
    resumed = world.run(*arguments(out, STEPS), seconds=60, before=before)
    assert resumed.code == 0, f"does not go on: {resumed.said}"
    same(reference, out)


def again(world, shim, arguments, reference, at):
    """A finished run stays published whenever it is given again."""
    out = world.folder_for("again") / "out"
    shutil.copytree(reference, out)
    world.run(*arguments(out, STEPS), seconds=60, LD_PRELOAD=shim, KILL_AT=at)
    assert (out / "model_index.json").is_file(), "the model was unpublished"
    world.run(*arguments(out, STEPS), seconds=60).worked()
    same(reference, out)


def same(reference, out):
    """The same weights, log, files and modes; nothing beside the folder either."""
    assert (out / WEIGHTS).read_bytes() == (reference / WEIGHTS).read_bytes(), "other weights"
    assert curve(out) == curve(reference), "another log"
    beside = [path.name for path in out.parent.iterdir() if path != out]
    assert not beside, f"left beside the folder: {beside}"
    more, fewer = files(out) - files(reference), files(reference) - files(out)
    assert not more and not fewer, f"files too many: {sorted(more)}, too few: {sorted(fewer)}"
    for path in out.rglob("*"):
        twin = reference / path.relative_to(out)
        if twin.exists():
            modes = stat.filemode(path.stat().st_mode), stat.filemode(twin.stat().st_mode)
            assert modes[0] == modes[1], f"{path.name}: {modes}"


def curve(out):
    times = ("seconds", "images_per_second")
    lines = (out / "training/log.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in times} for line in lines]
