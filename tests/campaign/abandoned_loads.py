"""Loads whose clients hang up: they are cancelled or bounded, memory and latency stay, and the model serves."""

import time

LOADS = 60
MOST_GROWN_BYTES = 200 << 20
HEALTH_SECONDS = 1


def cases(world):
    for model in ("teacher", "fashion-mnist-teacher"):
        for what in ("load", "unload and load"):
            yield f"60 {what}s of {model}, dropped", lambda m=model, w=what: dropped(world, m, w)


def dropped(world, model, what):
    models = world.bundled if model.startswith("fashion") else world.models
    with world.serve(models=models) as server:
        assert server.image(model).status == 200
        before = peak = server.resident_bytes()
        routes = [f"/v2/repository/models/{model}/{part}" for part in what.split(" and ")]
        for _ in range(LOADS):
            for route in routes:
                client = server.connect()
                client.sendall(f"POST {route} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n".encode())
                time.sleep(0.005)
                client.close()
        end = time.monotonic() + 5
        while time.monotonic() < end:
            began = time.monotonic()
            # While a model that was unloaded is loaded again, the server says that it is not ready.
            server.lives(loading="unload" in what)
            took = time.monotonic() - began
            assert took <= HEALTH_SECONDS, f"/health took {took:.1f} s"
            peak = max(peak, server.resident_bytes())
            time.sleep(0.1)
        assert peak - before <= MOST_GROWN_BYTES, f"grew by {(peak - before) >> 20} MiB"
        reply = server.post(f"/v2/repository/models/{model}/load", seconds=20)
        assert reply.status in (200, 409), f"{reply.status} {reply.text()}"
        reply = server.image(model, seconds=20)
        assert reply.status == 200, f"{reply.status} {reply.text()}"
