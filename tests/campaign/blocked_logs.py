"""Nobody reads what the server says: it serves all the same, and stops when it is told to."""

import fcntl
import os
import signal

REQUESTS = 2000
SETPIPE_SIZE = 1031  # Linux: F_SETPIPE_SZ


def cases(world):
    yield "stderr is a pipe that nobody reads", lambda: unread(world, close=False)
    yield "stderr is a pipe that nobody can read", lambda: unread(world, close=True)
    yield "stderr is a full device", lambda: full(world)
    yield "stderr is a pipe that nobody reads, JSON, debug", lambda: unread(world, False, "--log-format", "json", RUST_LOG="debug")


def unread(world, close, *flags, **environment):
    read, write = os.pipe()
    fcntl.fcntl(write, SETPIPE_SIZE, 4096)
    if close:
        os.close(read)
    try:
        with world.serve(*flags, stderr=write, **environment) as server:
            for index in range(REQUESTS):
                # Refusals are logged, and cost nothing else.
                reply = server.post("/v1/images/generations", {"model": f"no-such-{index}"}, seconds=5)
                assert reply.status == 404, f"request {index}: {reply.status} {reply.text()}"
            assert server.image().status == 200
            server.signal(signal.SIGTERM)
            assert server.ends(15) == 0
    finally:
        os.close(write)
        if not close:
            os.close(read)


def full(world):
    with open("/dev/full", "wb") as device, world.serve(stderr=device) as server:
        for index in range(100):
            assert server.post("/v1/images/generations", {"model": f"no-such-{index}"}).status == 404
        server.lives()
        server.signal(signal.SIGTERM)
        assert server.ends(15) == 0
