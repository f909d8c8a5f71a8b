"""Damaged pages in the file of experiments: said at the start or shown by health, never a panic, never 500 behind a 200."""

import re
import shutil

PAGE = 4096
ARMS = [{"model": "teacher", "weight": 1}, {"model": "student", "weight": 1}]


def cases(world):
    made = []
    kept = filled(world)
    pages = kept.stat().st_size // PAGE
    for page in range(pages):
        for how in ("zeros", "noise", "a bit"):
            for running in (False, True):
                when = "under the server" if running else "before the start"
                made.append((f"page {page} of {pages}, {how}, {when}", lambda p=page, h=how, r=running: damaged(world, kept, p, h, r)))
    made += [(f"the file, {how}", lambda h=how: whole(world, kept, h)) for how in ("empty", "cut", "text", "a folder")]
    world.random.shuffle(made)
    yield from made


def filled(world):
    """A file with experiments, pairs and votes in it."""
    data = world.folder_for("experiments")
    with world.serve("--data-dir", data) as server:
        for index in range(4):
            reply = server.post("/v1/experiments", {"id": f"e{index}", "arms": ARMS})
            assert reply.status == 201, reply.text()
        for index in range(12):
            pair = server.post(f"/v1/experiments/e{index % 4}/pairs", {"num_inference_steps": 1}).json()
            vote = {"pair_id": pair["pair_id"], "choice": index % 2, "idempotency_key": f"k{index}"}
            reply = server.post(f"/v1/experiments/e{index % 4}/votes", vote)
            assert reply.status == 201, reply.text()
    (kept,) = [path for path in data.iterdir() if path.suffix == ".redb"]
    return kept


def spoil(world, path, page, how):
    with open(path, "r+b") as file:
        file.seek(page * PAGE)
        content = bytearray(file.read(PAGE))
        if how == "zeros":
            content = bytes(PAGE)
        elif how == "noise":
            content = world.random.randbytes(PAGE)
        else:
            content[world.random.randrange(PAGE)] ^= 1 << world.random.randrange(8)
        file.seek(page * PAGE)
        file.write(content)


def damaged(world, kept, page, how, running):
    data = world.folder_for("data")
    copy = data / kept.name
    shutil.copy(kept, copy)
    if not running:
        spoil(world, copy, page, how)
        if refused(world, data):
            return
    with world.serve("--data-dir", data) as server:
        if running:
            spoil(world, copy, page, how)
        answers(server)


def refused(world, data):
    """Whether a server says at its start that it cannot use the file, by name."""
    with world.serve("--data-dir", data, wait=False) as server:
        try:
            server.ready()
            return False
        except AssertionError:
            assert server.process.poll() == 1, f"ended with {server.process.poll()}: {server.said()}"
            assert "panicked at" not in server.said(), server.said()
            assert str(data) in server.said() or "--data-dir" in server.said(), server.said()
            return True


def answers(server):
    """Reads and writes: done, or 503 that health or a metric shows as well."""
    failed = []
    for index in range(6):
        requests = [
            ("GET", "/v1/experiments", None),
            ("GET", f"/v1/experiments/e{index % 4}", None),
            ("POST", "/v1/experiments", {"id": f"new{index}", "arms": ARMS}),
            ("PATCH", f"/v1/experiments/e{index % 4}", {"arms": [{"model": "teacher", "weight": 1 + index}, ARMS[1]]}),
            ("POST", f"/v1/experiments/e{index % 4}/pairs", {"num_inference_steps": 1}),
            ("DELETE", f"/v1/experiments/new{index}", None),
        ]
        for method, path, body in requests:
            reply = server.ask(method, path, body)
            assert reply.status != 500, f"{method} {path}: 500 {reply.text()}"
            if reply.status == 503:
                failed.append(f"{method} {path}: {reply.text()}")
    assert server.process.poll() is None and "panicked at" not in server.said(), server.said()[-400:]
    if failed:
        health = server.get("/health")
        metrics = server.get("/metrics").body.decode()
        shown = health.status == 503 or "experiment" in health.text()
        counted = re.search(r"^understudy_experiment\w*(fail|error|up|available|reopen|restart|broken)\w*(\{.*\})? ", metrics, re.M)
        assert shown or counted, f"neither health nor a metric shows it: {failed[0]}"
    # Images do not depend on experiments.
    assert server.image().status == 200


def whole(world, kept, how):
    data = world.folder_for("data")
    path = data / kept.name
    if how == "a folder":
        path.mkdir()
    else:
        content = kept.read_bytes()
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "text": b"text\n" * 5000}[how])
    if not refused(world, data):
        with world.serve("--data-dir", data) as server:
            answers(server)


