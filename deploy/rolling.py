#!/usr/bin/env python3
"""Two replicas behind HAProxy, each restarted twice under load: no request may fail.

    deploy/rolling.py [BINARY]

Starts two servers from BINARY (by default the newest of target/*/understudy) and Debian's HAProxy, which asks their /health
five times a second and sends each request to one that is ready; all on free ports. `understudy load-test` asks through it all
the while. Each replica is stopped with SIGTERM and started again, in turns, twice. `--shutdown-delay-seconds` is what makes it
work: between the signal and the moment in which HAProxy has seen it, requests still arrive. Exits with 0 only if every
reply was a picture. Needs nothing but Python and HAProxy.
"""

import contextlib
import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
RATE = 5
ROUNDS = 2


def main():
    binary = sys.argv[1] if len(sys.argv) > 1 else newest()
    haproxy = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
    if haproxy is None:
        sys.exit("haproxy is not installed")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        folder = pathlib.Path(folder)
        front, *ports = free_ports(3)
        replicas = [Replica(binary, port, folder / str(port)) for port in ports]
        for replica in replicas:
            running.callback(replica.stop)
            replica.start()
        for replica in replicas:
            replica.wait_until_ready()
        config = folder / "haproxy.cfg"
        config.write_text(proxy(front, ports))
        proxied = subprocess.Popen([haproxy, "-db", "-q", "-f", config])
        running.callback(proxied.kill)
        url = f"http://127.0.0.1:{front}"
        until(lambda: answers(url + "/health"), "HAProxy has no replica that is ready")

        report = folder / "load.json"
        load = subprocess.Popen(
            [binary, "load-test", "--url", url, "--rate", str(RATE), "--duration", "3600", "--steps", "4", "--json"],
            stdout=report.open("w"),
        )
        running.callback(load.kill)
        time.sleep(3)
        for turn in range(ROUNDS):
            for replica in replicas:
                began = time.monotonic()
                replica.stop()
                replica.start()
                replica.wait_until_ready()
                print(f"round {turn + 1}: port {replica.port} restarted in {time.monotonic() - began:.1f} s", flush=True)
                # HAProxy learns of it.
                time.sleep(2)
        load.send_signal(signal.SIGINT)
        load.wait(60)
        models = json.loads(report.read_text())["runs"][0]["models"]
        count = lambda field: sum(model[field] for model in models)
        accepted, lost = count("accepted"), count("refused_429") + count("refused_other") + count("failed")
        print(f"{accepted} replies with a picture, {lost} others, while two replicas were restarted {ROUNDS} times each")
        if lost or accepted < RATE * 10:
            sys.exit(json.dumps(models, indent=2))


class Replica:
    """One server, on a port of its own."""

    def __init__(self, binary, port, data):
        self.port = port
        self.command = [
            *(binary, "serve", "--port", str(port), "--data-dir", data, "--models", ROOT / "models/zoo"),
            *("--shutdown-delay-seconds", "2", "--drain-seconds", "30"),
        ]
        self.process = None
        self.log = data.with_suffix(".log")

    def start(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=self.log.open("a"))

    def stop(self):
        self.process.terminate()
        code = self.process.wait(60)
        if code:
            sys.exit(f"a replica ended with {code}")

    def wait_until_ready(self):
        until(lambda: answers(f"http://127.0.0.1:{self.port}/health"), "a replica does not become ready")


def proxy(front, ports):
    servers = "\n".join(f"    server replica{i} 127.0.0.1:{port} check" for i, port in enumerate(ports))
    return f"""
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    timeout check 2s
listen understudy
    bind 127.0.0.1:{front}
    option httpchk GET /health
    default-server inter 200ms fall 2 rise 2
    balance leastconn
{servers}
"""


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=2).status == 200
    except (OSError, urllib.error.HTTPError):
        return False


def until(holds, problem):
    end = time.monotonic() + 120
    while not holds():
        if time.monotonic() > end:
            sys.exit(problem)
        time.sleep(0.1)


def free_ports(count):
    """Ports that were free a moment ago, each another."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def newest():
    built = sorted(ROOT.glob("target/*/understudy"), key=lambda path: path.stat().st_mtime)
    if not built:
        sys.exit("no target/*/understudy; run cargo build first")
    return str(built[-1])


if __name__ == "__main__":
    main()
