"""Who may ask: a foreign page is refused on every route that changes something, whatever it says it sends."""

import http.client

from world import Reply

FOREIGN = ["http://evil.example", "null", "http://127.0.0.1.evil.example", "https://127.0.0.1"]
TYPES = [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/json"]
IMAGE = '{"num_inference_steps": 1}'
ROUTES = [
    ("POST", "/v1/images/generations", IMAGE),
    ("POST", "/v1/compare", IMAGE),
    ("POST", "/v1/experiments", '{"id": "x", "arms": [{"model": "teacher", "weight": 1}, {"model": "student", "weight": 1}]}'),
    ("PATCH", "/v1/experiments/e", '{"arms": [{"model": "teacher", "weight": 9}]}'),
    ("DELETE", "/v1/experiments/e", None),
    ("POST", "/v1/experiments/e/pairs", IMAGE),
    ("POST", "/v1/experiments/e/votes", '{"pair_id": "x", "choice": 0, "idempotency_key": "k"}'),
    ("POST", "/v2/models/teacher/infer", '{"inputs": []}'),
    ("POST", "/v2/repository/index", "{}"),
    ("POST", "/v2/repository/models/teacher/load", None),
    ("POST", "/v2/repository/models/slow/unload", None),
]
TAKES_BODY = [route for route in ROUTES if route[2] is not None]


def cases(world):
    with world.serve() as server:
        begun = server.post("/v1/experiments", {"id": "e", "arms": [{"model": "teacher", "weight": 1}, {"model": "student", "weight": 1}]})
        assert begun.status == 201, begun.text()
        made = list(on(server)) + list(started(world))
        world.random.shuffle(made)
        yield from made
        yield "nothing changed after all", lambda: unchanged(server)


def on(server):
    for method, path, body in ROUTES:
        for origin in FOREIGN:
            yield f"{method} {path} from {origin}", lambda m=method, p=path, b=body, o=origin: foreign(server, m, p, b, {"Origin": o})
        yield f"{method} {path}, cross-site", lambda m=method, p=path, b=body: foreign(server, m, p, b, {"Sec-Fetch-Site": "cross-site"})
        yield f"{method} {path} for another host", lambda m=method, p=path, b=body: rebound(server, m, p, b)
    for method, path, body in TAKES_BODY:
        yield f"{method} {path} of another type", lambda m=method, p=path, b=body: typed(server, m, p, b)
    for path in ["/", "/v1/models", "/metrics", "/openapi.json", "/v1/experiments"]:
        yield f"GET {path} for another host", lambda p=path: rebound(server, "GET", p, None)
        yield f"GET {path} without a host, and with two", lambda p=path: hosts(server, p)
    yield "a link from another site is followed", lambda: link(server)
    yield "the page's own requests are answered", lambda: own(server)
    yield "a client of no browser that declares no type is answered", lambda: undeclared(server)


def ask(server, method, path, body, headers):
    """With these heads and no others."""
    headers = {"Host": f"127.0.0.1:{server.port}"} | headers
    return raw(server, method, path, body, list(headers.items()))


def raw(server, method, path, body, headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    try:
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers:
            connection.putheader(name, value)
        if body is not None or method == "POST":
            connection.putheader("Content-Length", str(len(body or "")))
        connection.endheaders((body or "").encode())
        reply = connection.getresponse()
        return Reply(reply.status, dict(reply.getheaders()), reply.read())
    finally:
        connection.close()


def foreign(server, method, path, body, headers):
    for kind in TYPES:
        reply = ask(server, method, path, body, headers | ({"Content-Type": kind} if kind else {}))
        assert reply.status == 403, f"{headers}, type {kind}: {reply.status} {reply.text()}"


def rebound(server, method, path, body):
    """The name in `Host` leads to 127.0.0.1 by an attacker's name server."""
    for host in ["evil.example", f"evil.example:{server.port}", f"localhost.evil.example:{server.port}", "169.254.169.254"]:
        kind = {"Content-Type": "application/json"} if body is not None else {}
        reply = ask(server, method, path, body, {"Host": host} | kind)
        assert reply.status in (403, 421), f"Host: {host}: {reply.status} {reply.text()}"


def typed(server, method, path, body):
    """A declared type that the route does not take; and none declared, by a browser's page."""
    for kind in ["text/plain", "application/x-www-form-urlencoded", "text/json;x", "application/xml"]:
        reply = ask(server, method, path, body, {"Content-Type": kind})
        assert reply.status == 415, f"type {kind}: {reply.status} {reply.text()}"
    own = {"Origin": f"http://127.0.0.1:{server.port}", "Sec-Fetch-Site": "same-origin"}
    reply = ask(server, method, path, body, own)
    assert reply.status == 415, f"no type, from the page: {reply.status} {reply.text()}"


def hosts(server, path):
    for headers in [[], [("Host", "127.0.0.1"), ("Host", "127.0.0.1")], [("Host", "127.0.0.1"), ("Host", "evil.example")]]:
        reply = raw(server, "GET", path, None, headers)
        assert reply.status == 400, f"{headers}: {reply.status} {reply.text()}"


def link(server):
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    reply = ask(server, "GET", "/", None, headers)
    assert reply.status == 200, f"{reply.status} {reply.text()}"


def own(server):
    for host in [f"127.0.0.1:{server.port}", f"localhost:{server.port}"]:
        headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin", "Content-Type": "application/json"}
        reply = ask(server, "POST", "/v1/images/generations", IMAGE, headers)
        assert reply.status == 200, f"{host}: {reply.status} {reply.text()}"


def undeclared(server):
    reply = ask(server, "POST", "/v2/repository/index", "{}", {})
    assert reply.status == 200, f"{reply.status} {reply.text()}"


def unchanged(server):
    reply = server.get("/v1/experiments/e")
    assert reply.status == 200 and server.get("/v1/experiments/x").status == 404, reply.text()
    assert server.get("/v2/models/slow/ready").status == 200, "a model was unloaded"
    server.lives()


def started(world):
    """What is said when a server starts."""
    yield "an origin that is named is let in", lambda: named_origin(world)
    yield "an admin key guards loading and deleting", lambda: admin(world)
    yield "beyond loopback without a key is warned of, and what an admin may do is closed", lambda: beyond_loopback(world)
    yield "keys are trimmed", lambda: trimmed(world)
    for keys in ["", "a,,b", " ", "a, ,b"]:
        yield f"an empty key is refused: {keys!r}", lambda keys=keys: empty_key(world, keys)


def named_origin(world):
    with world.serve("--cors-allow-origin", "https://example.org") as server:
        json = {"Content-Type": "application/json"}
        reply = ask(server, "POST", "/v1/images/generations", IMAGE, json | {"Origin": "https://example.org"})
        assert reply.status == 200, f"{reply.status} {reply.text()}"
        reply = ask(server, "POST", "/v1/images/generations", IMAGE, json | {"Origin": "https://example.net"})
        assert reply.status == 403, f"{reply.status} {reply.text()}"


def admin(world):
    with world.serve("--api-key", "user", "--admin-key", "admin") as server:
        for key, allowed in [("user", False), ("admin", True)]:
            for path in ["/v2/repository/models/slow/unload", "/v2/repository/models/slow/load"]:
                status = server.post(path, headers={"Authorization": f"Bearer {key}"}).status
                assert (status == 200) == allowed, f"{path} with the key of {key}: {status}"


def beyond_loopback(world):
    with world.serve("--host", "0.0.0.0") as server:
        assert "WARN" in server.said() and "key" in server.said(), f"no warning: {server.said()}"
        for path in ["/v2/repository/models/slow/unload", "/v2/repository/models/slow/load"]:
            status = server.post(path).status
            assert status in (401, 403), f"{path}: {status}"


def trimmed(world):
    with world.serve(UNDERSTUDY_API_KEY="a, b\n") as server:
        for key in ["a", "b"]:
            status = server.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status
            assert status == 200, f"{key}: {status}"


def empty_key(world, keys):
    arguments = ["serve", "--port", 0, "--models", world.models, "--data-dir", world.folder_for("data")]
    world.run(*arguments, UNDERSTUDY_API_KEY=keys).refused(["api-key", "API_KEY"])
