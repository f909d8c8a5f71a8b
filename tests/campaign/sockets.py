"""Two hundred connections that do not go on, at 64 descriptors: /health answers within a second, and others are served."""

import contextlib
import http.client
import resource
import socket
import threading
import time

DESCRIPTORS = 64
CONNECTIONS = 200
HEALTH_SECONDS = 1
# What is said to end such connections, with time to spare on a busy machine.
HEAD_SECONDS = 10 + 5
BODY_SECONDS = 30 + 5
IDLE_SECONDS = 60 + 5

HEAD = b"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
STATES = {
    "idle": b"",
    "half-headed": HEAD,
    "half-bodied": HEAD + b"Content-Length: 1000\r\n\r\n{",
    "unread": b"GET /openapi.json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 32,
    "between requests": b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
}


def cases(world):
    made = [(f"200 sockets, {state}", lambda state=state: crowded(world, state)) for state in STATES]
    made += [
        ("200 sockets of every kind", lambda: crowded(world, None)),
        ("a client that closes its sending half has its answer", lambda: half_closed(world)),
        ("bodies of 16 × 64 MiB", lambda: large_bodies(world)),
        ("a second client under one that fills the queue", lambda: greedy(world)),
        ("after 200 sockets have gone", lambda: recovers(world)),
        ("a head that never ends is closed", lambda: closed(world, "half-headed", HEAD_SECONDS)),
        ("a body that never ends is closed", lambda: closed(world, "half-bodied", BODY_SECONDS)),
        ("an idle connection is closed", lambda: closed(world, "idle", IDLE_SECONDS)),
        ("a connection between requests is closed", lambda: closed(world, "between requests", IDLE_SECONDS)),
        ("a head of one byte a second is closed", lambda: slow_head(world)),
    ]
    yield from made


@contextlib.contextmanager
def crowd(server, state, count=CONNECTIONS):
    """Connections in a state, as many as can be had."""
    clients = []
    kinds = [state] if state else list(STATES)
    try:
        for index in range(count):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(2)
            with contextlib.suppress(OSError):
                client.connect(("127.0.0.1", server.port))
                client.setblocking(False)
                client.send(STATES[kinds[index % len(kinds)]])
            clients.append(client)
        yield clients
    finally:
        for client in clients:
            client.close()


def limited(world, *flags):
    return world.serve(*flags, limits=[(resource.RLIMIT_NOFILE, DESCRIPTORS)])


def health(server):
    """The status, and the seconds it took."""
    began = time.monotonic()
    try:
        status = server.get("/health", seconds=5).status
    except OSError as problem:
        status = repr(problem)
    return status, time.monotonic() - began


def crowded(world, state):
    with limited(world) as server, crowd(server, state):
        time.sleep(0.5)
        for _ in range(5):
            status, seconds = health(server)
            assert status == 200 and seconds <= HEALTH_SECONDS, f"/health: {status} after {seconds:.1f} s"
        assert server.process.poll() is None, server.said()[-400:]


def recovers(world):
    with limited(world) as server:
        for state in STATES:
            with crowd(server, state):
                time.sleep(0.2)
        time.sleep(0.5)
        reply = server.image()
        assert reply.status == 200, reply.text()
        server.lives()


def half_closed(world):
    with world.serve() as server, server.connect() as client:
        body = b'{"model": "teacher", "seed": 1, "num_inference_steps": 20}'
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        client.shutdown(socket.SHUT_WR)
        reply = http.client.HTTPResponse(client)
        reply.begin()
        assert reply.status == 200, f"{reply.status} {reply.read(200)}"
        reply.read()


def closed(world, state, seconds):
    with world.serve() as server, server.connect() as client:
        client.sendall(STATES[state])
        client.settimeout(seconds)
        try:
            while client.recv(1 << 20):
                pass
        except TimeoutError:
            raise AssertionError(f"still open after {seconds} s") from None
        except ConnectionResetError:
            pass
        server.lives()


def slow_head(world):
    with world.serve() as server, server.connect() as client:
        end = time.monotonic() + HEAD_SECONDS
        client.sendall(b"GET /health HTTP/1.1\r\nX: ")
        client.settimeout(1)
        while time.monotonic() < end:
            try:
                client.sendall(b"x")
                if client.recv(1024) == b"":
                    return
            except TimeoutError:
                continue
            except (ConnectionResetError, BrokenPipeError):
                return
        raise AssertionError(f"still open after {HEAD_SECONDS} s")


def large_bodies(world):
    """Sixteen bodies as large as they may be, at once, of numbers that are parsed and refused."""
    with world.serve() as server:
        before = server.resident_bytes()
        numbers = b'{"inputs": [{"name": "sample", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": ['
        body = numbers + b"0.123456789," * ((64 << 20) // 12 - 16) + b"0]}]}"
        statuses, peak = [], [before]

        def send():
            try:
                statuses.append(server.post("/v2/models/teacher/infer", body, headers={"Content-Type": "application/json"}, seconds=120).status)
            except OSError as problem:
                # Refused and closed while the body was on its way is an answer, too.
                statuses.append(repr(problem))

        threads = [threading.Thread(target=send) for _ in range(16)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            status, seconds = health(server)
            assert status == 200 and seconds <= HEALTH_SECONDS, f"/health: {status} after {seconds:.1f} s"
            peak.append(server.resident_bytes())
            time.sleep(0.1)
        # Half a gibibyte and what is parsed of it: not sixteen bodies and their numbers.
        grown = max(peak) - before
        assert grown <= 1 << 30, f"grew by {grown >> 20} MiB: {statuses}"
        assert not [status for status in statuses if isinstance(status, int) and status >= 500 and status != 503], statuses
        server.lives()


def greedy(world):
    """One client's requests fill the queue; another one's is served before they are all done."""
    keys = ("--api-key", "one,two", "--max-queue", 16)
    with world.serve(*keys) as server:
        stop = threading.Event()

        def hog():
            headers = {"Content-Type": "application/json", "Authorization": "Bearer one"}
            body = '{"model": "slow", "n": 4, "num_inference_steps": 500}'
            while not stop.is_set():
                with contextlib.suppress(OSError):
                    server.post("/v1/images/generations", body, headers=headers, seconds=60)

        threads = [threading.Thread(target=hog, daemon=True) for _ in range(12)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        headers = {"Content-Type": "application/json", "Authorization": "Bearer two"}
        served, end = 0, time.monotonic() + 20
        while not served and time.monotonic() < end:
            body = '{"model": "slow", "num_inference_steps": 10}'
            served += server.post("/v1/images/generations", body, headers=headers, seconds=20).status == 200
        stop.set()
        assert served, "the second client had nothing but refusals for 20 s"
