"""Requests with bytes and values changed at random: never 500, never silence, and the next image has the same bytes."""

import contextlib
import copy
import json
import random
import socket

ROUNDS = 100
REQUESTS = 1000
IMAGE = {
    "model": "teacher", "prompt": "1", "n": 1, "seed": 3, "num_inference_steps": 1, "scheduler": "ddim", "eta": 0.0,
    "guidance_scale": 1.0, "output_format": "png", "class_label": 1, "stream": False, "partial_images": 0, "user": "u",
    "deadline_ms": 60_000, "response_format": "b64_json", "size": "8x8",
}
INFER = {
    "id": "1",
    "inputs": [
        {"name": "sample", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": [0.5] * 64},
        {"name": "timestep", "shape": [1], "datatype": "INT64", "data": [3]},
        {"name": "class_labels", "shape": [1], "datatype": "INT64", "data": [1]},
    ],
    "outputs": [{"name": "sample", "parameters": {"binary_data": True}}],
}
ARMS = [{"model": "teacher", "weight": 1}, {"model": "student", "weight": 1}]
ROUTES = [
    ("POST", "/v1/images/generations", IMAGE),
    ("POST", "/v1/compare", {"prompt": "1", "seed": 3, "num_inference_steps": 1, "stream": False}),
    ("POST", "/v1/experiments", {"id": "f", "arms": ARMS}),
    ("PATCH", "/v1/experiments/e", {"arms": ARMS}),
    ("POST", "/v1/experiments/e/pairs", {"num_inference_steps": 1, "class_label": 1, "seed": 2}),
    ("POST", "/v1/experiments/e/votes", {"pair_id": "x", "choice": 0, "idempotency_key": "k"}),
    ("DELETE", "/v1/experiments/f", None),
    ("POST", "/v2/models/teacher/infer", INFER),
    ("POST", "/v2/repository/index", {"ready": True}),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/teacher", None),
    ("GET", "/v2/models/teacher", None),
    ("GET", "/v1/experiments/e", None),
    ("GET", "/metrics", None),
    ("GET", "/", None),
]
VALUES = [
    None, True, False, 0, -1, 1, 2, 3, 0.5, -0.0, 1e308, -1e308, 1e-320, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**40, "", "x", "0",
    "\x00", "é" * 300, "x" * 100_000, "../..", "\ud800", [], {}, [[]], [None], {"a": 1}, [0] * 10_000, "NaN", "auto", "draft", "experiment:e", "ddpm", "heun",
    "png", "webp", "jpeg", "teacher", "student", "slow", "2024x2024",
]
SLOW_HEADS = [
    "Content-Type: application/json", "Accept: image/png", "Accept: */*;q=0", "Content-Type: application/octet-stream",
    "Inference-Header-Content-Length: 10", "Inference-Header-Content-Length: 99999999999", "Transfer-Encoding: chunked", "Expect: 100-continue",
    "Authorization: Bearer \x80", "Content-Encoding: gzip", "Range: bytes=0-1", "traceparent: 00-x", "X-Request-Id: " + "x" * 5000, "x-understudy-key: k",
    "Connection: close", "Upgrade: h2c", "Accept: text/event-stream",
]
SILENCE_SECONDS = 15


def cases(world):
    seed = world.random.randrange(1 << 32)
    with world.serve("--max-queue", 8, "--request-timeout-seconds", 5) as server:
        server.post("/v1/experiments", {"id": "e", "arms": ARMS})
        reference = server.image(seed=3).body
        for index in range(ROUNDS):
            yield f"requests {index * REQUESTS} to {(index + 1) * REQUESTS}, seed {seed + index}", lambda i=index: thousand(server, seed + i, reference)


def thousand(server, seed, reference):
    chance = random.Random(seed)
    client = Client(server)
    answered = {}
    for number in range(REQUESTS):
        request = fuzzed(chance)
        status = client.ask(request)
        answered[status] = answered.get(status, 0) + 1
        assert status not in (500, 501, 502), f"request {number}: {status} to {request[:300]!r}: {client.answer[-300:]!r}"
    server.lives()
    reply = server.image(seed=3, seconds=20)
    assert reply.status == 200 and reply.body == reference, f"another image: {reply.status}; {answered}"
    # A fuzzer that is refused everywhere has seen nothing.
    assert sum(count for status, count in answered.items() if status and status < 300) > REQUESTS // 50, answered


def fuzzed(chance):
    method, path, body = chance.choice(ROUTES)
    heads = ["Host: 127.0.0.1"]
    if body is not None:
        body = json.loads(json.dumps(body))
        for _ in range(chance.choice([0, 1, 1, 1, 2, 4])):
            body = changed(chance, body)
        text = json.dumps(body).encode()
        heads.append("Content-Type: application/json")
    else:
        text = b""
    if chance.random() < 0.15:
        text = spoiled(chance, text)
    if chance.random() < 0.2:
        heads.append(chance.choice(SLOW_HEADS))
    if chance.random() < 0.1:
        path = "".join(chance.choice([path, "/", "..", "%00", "%2e", "?a=b", "é", "//", "%ff", "x" * 50]) for _ in range(3))
        path = path if path.startswith("/") else "/" + path
    if chance.random() < 0.05:
        method = chance.choice(["PUT", "HEAD", "OPTIONS", "TRACE", "PATCH", "get", "X" * 40])
    length = len(text) + (chance.choice([-1, 1, 2**40, -len(text) - 1]) if chance.random() < 0.02 else 0)
    chunked = any(head.startswith("Transfer") for head in heads)
    if not chunked:
        heads.append(f"Content-Length: {length}")
    else:
        text = b"%x\r\n" % len(text) + text + b"\r\n0\r\n\r\n" if text else b"0\r\n\r\n"
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{line}\r\n" for line in heads) + "\r\n"
    head = head.encode("latin-1", "replace")
    return spoiled(chance, head) + text if chance.random() < 0.03 else head + text


def changed(chance, value):
    """One value somewhere inside is another, or gone, or there is one more."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        what = chance.random()
        if what < 0.1:
            del value[key]
        elif what < 0.2:
            value[chance.choice(["x", "", "seed", "n", "model"])] = copy.deepcopy(chance.choice(VALUES))
        else:
            value[key] = changed(chance, value[key])
        return value
    if isinstance(value, list) and value and chance.random() < 0.7:
        index = chance.randrange(len(value))
        if chance.random() < 0.2:
            value[index:] = value[index:] * chance.choice([0, 2])
        else:
            value[index] = changed(chance, value[index])
        return value
    return copy.deepcopy(chance.choice(VALUES))


def spoiled(chance, content):
    content = bytearray(content)
    for _ in range(chance.randrange(1, 5)):
        if content:
            at = chance.randrange(len(content))
            what = chance.randrange(4)
            if what == 0:
                content[at] = chance.randrange(256)
            elif what == 1:
                del content[at : at + chance.randrange(1, 20)]
            elif what == 2:
                content[at:at] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 8)))
            else:
                content[at:at] = content[at : at + 50]
    return bytes(content)


class Client:
    """One connection after the other, each kept while the server keeps it."""

    def __init__(self, server):
        self.server, self.socket, self.answer = server, None, b""

    def ask(self, request):
        """The status; None where the server closed the connection, or waits for what was not sent."""
        self.answer = b""
        fresh = self.socket is None
        try:
            self.socket = self.socket or self.server.connect(SILENCE_SECONDS)
            self.socket.sendall(request)
            # What is cut short by its own length is waited for: the end of sending tells the server.
            if not whole(request):
                with contextlib.suppress(OSError):
                    self.socket.shutdown(socket.SHUT_WR)
            return self.read(request)
        except (ConnectionResetError, BrokenPipeError):
            self.close()
            return None if fresh else self.ask(request)
        except TimeoutError:
            self.close()
            raise AssertionError(f"silent for {SILENCE_SECONDS} s after {request[:300]!r}") from None

    def read(self, request):
        while b"\r\n\r\n" not in self.answer:
            part = self.socket.recv(1 << 16)
            if not part:
                self.close()
                return None
            self.answer += part
        head, _, body = self.answer.partition(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        names = {line.split(b":")[0].lower(): line.split(b":", 1)[1].strip() for line in head.split(b"\r\n")[1:]}
        left = int(names.get(b"content-length", b"0")) - len(body)
        keep = b"content-length" in names and whole(request) and not request.startswith(b"HEAD") and names.get(b"connection") != b"close"
        while keep and left > 0:
            part = self.socket.recv(1 << 16)
            left -= len(part)
            keep = bool(part)
        if not keep or left < 0 or status < 200:
            self.close()
        return status

    def close(self):
        if self.socket:
            self.socket.close()
        self.socket = None


def whole(request):
    """Whether the request ends where its own head says."""
    head, end, body = request.partition(b"\r\n\r\n")
    lengths = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    return bool(end) and len(lengths) == 1 and lengths[0].split(b":")[1].strip() == str(len(body)).encode() and b"xpect" not in head
