"""SIGINT and SIGTERM in every phase: the first ends what waits for others, the second ends everything at once."""

import contextlib
import signal
import socket
import subprocess
import threading
import time

from world import ENDLESS

# A drain that nobody waits for in a test; who is told twice does not.
LONG = ("--drain-seconds", 60)
SHORT = ("--drain-seconds", 1)
# Beyond what was asked for, on a busy machine.
SPARE_SECONDS = 4


def cases(world):
    made = []
    for name in ("SIGINT", "SIGTERM"):
        number = getattr(signal, name)
        for phase in (idle, half_headed, half_bodied):
            made.append((f"{phase.__name__}, {name} once", lambda phase=phase, number=number: once(world, phase, LONG, number, SPARE_SECONDS)))
        # These are waited for, but no longer than the drain.
        for phase in (in_flight, unread_answer):
            made.append((f"{phase.__name__}, {name} once", lambda phase=phase, number=number: once(world, phase, SHORT, number, 1 + SPARE_SECONDS)))
        for phase in (idle, half_headed, in_flight, loading_a_model):
            made.append((f"{phase.__name__}, {name} twice", lambda phase=phase, number=number: twice(world, phase, number)))
        for times in (1, 2):
            made.append((f"starting, {name} × {times}", lambda number=number, times=times: starting(world, number, times)))
            made.append((f"a Hub that is silent, serve, {name} × {times}", lambda number=number, times=times: silent_hub_serve(world, number, times)))
            for command in ("sample", "evaluate", "train", "distill"):
                made.append((f"{command}, {name} × {times}", lambda c=command, n=number, t=times: command_at_work(world, c, n, t)))
        made.append((f"a Hub that is silent, sample, {name}", lambda number=number: silent_hub_sample(world, number)))
    world.random.shuffle(made)
    yield from made


def once(world, phase, flags, number, seconds):
    with world.serve(*flags) as server, phase(server):
        server.signal(number)
        assert server.ends(seconds) == 0, server.said()[-400:]


def twice(world, phase, number):
    with world.serve(*LONG) as server, phase(server):
        server.signal(number)
        time.sleep(0.3)
        server.signal(number)
        server.ends(2)


@contextlib.contextmanager
def idle(server):
    with server.connect():
        yield


@contextlib.contextmanager
def half_headed(server):
    with server.connect() as client:
        client.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        yield


@contextlib.contextmanager
def half_bodied(server):
    with server.connect() as client:
        client.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        time.sleep(0.2)
        yield


@contextlib.contextmanager
def unread_answer(server):
    """An answer that the client does not take."""
    with server.connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 64)
        time.sleep(0.2)
        yield


@contextlib.contextmanager
def in_flight(server):
    """A request that takes longer than any drain."""
    def ask():
        with contextlib.suppress(OSError, Exception):
            server.image("slow", steps=ENDLESS, seconds=120)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    wait_for(lambda: "understudy_samples_running 1" in server.get("/metrics").body.decode() or busy(server))
    yield


def busy(server):
    """Whether anything is evaluated: some gauge of running samples is not 0."""
    lines = server.get("/metrics").body.decode().splitlines()
    return any(line.startswith("understudy_") and "running" in line and not line.endswith(" 0") for line in lines)


@contextlib.contextmanager
def loading_a_model(server):
    clients = []
    for _ in range(8):
        client = server.connect()
        client.sendall(b"POST /v2/repository/models/teacher/load HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n")
        clients.append(client)
    try:
        yield
    finally:
        for client in clients:
            client.close()


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the phase did not begin"
        time.sleep(0.02)


def starting(world, number, times):
    """While models load and warm up."""
    with world.serve("--drain-seconds", 60, wait=False) as server:
        wait_for(lambda: listening(server))
        for _ in range(times):
            server.signal(number)
            time.sleep(0.1)
        server.ends(SPARE_SECONDS if times == 1 else 2)


def listening(server):
    try:
        server.connect(1).close()
        return True
    except OSError:
        return False


@contextlib.contextmanager
def silent_hub():
    """Takes connections and never says a word; yields its address, and an event for the first connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        came, clients = threading.Event(), []

        def accept():
            with contextlib.suppress(OSError):
                while True:
                    clients.append(listener.accept()[0])
                    came.set()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", came
        listener.shutdown(socket.SHUT_RDWR)
        for client in clients:
            client.close()


def silent_hub_serve(world, number, times):
    with silent_hub() as (address, came):
        with world.serve("--default-model", "owner/name", *LONG, wait=False, HF_ENDPOINT=address) as server:
            assert came.wait(10), f"the Hub was not asked: {server.said()}"
            for _ in range(times):
                server.signal(number)
                time.sleep(0.1)
            server.ends(SPARE_SECONDS if times == 1 else 2)


def silent_hub_sample(world, number):
    with silent_hub() as (address, came):
        arguments = ["sample", "--model", "owner/name", "--n", 1, "--out", world.folder_for("out") / "x.png"]
        with started(world, arguments, HF_ENDPOINT=address) as process:
            assert came.wait(10), "the Hub was not asked"
            process.send_signal(number)
            ends(process, 2)


def command_at_work(world, command, number, times):
    out = world.folder_for("work")
    arguments = {
        "sample": ["sample", "--model", world.models / "slow", "--n", 1000, "--steps", ENDLESS, "--out", out],
        "evaluate": ["evaluate", "--model", world.bundled / "fashion-mnist-teacher", "--n", 200, "--steps", 1000, "--reference", world.samples],
        "train": world.train_arguments(out / "new", 1_000_000),
        "distill": world.distill_arguments(out / "new", 1_000_000),
    }[command]
    with started(world, arguments) as process:
        time.sleep(1)
        assert process.poll() is None, f"it was over before the signal: {process.returncode}"
        for _ in range(times):
            process.send_signal(number)
            time.sleep(0.1)
        # What a training leaves half written is removed when it goes on: kills.py looks.
        ends(process, SPARE_SECONDS if times == 1 else 2)


@contextlib.contextmanager
def started(world, arguments, **environment):
    process = subprocess.Popen(
        world.command(*arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=world.environment(**environment),
        cwd=world.folder,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def ends(process, seconds):
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"still running {seconds} s after the signal") from None
