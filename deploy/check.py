#!/usr/bin/env python3
"""Every query of the dashboard, answered by a real Prometheus that scraped a real server.

    deploy/check.py [BINARY]

Starts BINARY (by default the newest of target/*/understudy) with a pair of models and Debian's
Prometheus with the rules of this folder, both on free ports, makes half a minute of traffic of every
kind, and asks what the dashboard asks. Exits with 0 only if every query has an answer, the speed-up
agrees with what the API told, and `promtool` is content. Needs nothing but Python and Prometheus.
"""

import contextlib
import json
import math
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
TRAFFIC_SECONDS = 30
RATE_INTERVAL = "30s"
MAX_QUEUE = 8


def main():
    promtool()
    built = sorted(ROOT.glob("target/*/understudy"), key=lambda path: path.stat().st_mtime)
    program = sys.argv[1] if len(sys.argv) > 1 else str(built[-1])
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        models = pair(folder / "models")
        with server(program, models, folder) as base, prometheus(base, folder) as address:
            speedups = traffic(base)
            time.sleep(2)  # two scrapes
            for panel, expression, legend in queries():
                problem, values = ask(address, expression, legend)
                if not problem and panel == "Speed-up, paired runs":
                    # Shadows count as pairs too, and the API does not tell of them.
                    if not min(speedups) / 2 <= values[0] <= max(speedups) * 2:
                        problem = f"the API told {min(speedups):.2f} to {max(speedups):.2f}"
                failures += bool(problem)
                shown = ", ".join(f"{value:.4g}" for value in values)
                print(f"{'FAILED' if problem else 'ok':6} {panel:32} {problem or shown}")
                if problem:
                    print(expression)
            rules = get(address, "/api/v1/rules")["groups"][0]["rules"]
            unwell = [rule["name"] for rule in rules if rule["health"] not in ("ok", "unknown")]
            assert len(rules) == 9 and not unwell, unwell
    count = len(list(queries()))
    print(f"{count - failures} passed, {failures} failed")
    sys.exit(failures > 0)


def promtool():
    """The configuration is valid and the alert rules do what their tests say."""
    for command in (["check", "config", "prometheus.yaml"], ["test", "rules", "alerts_test.yaml"]):
        done = subprocess.run(["promtool", *command], cwd=HERE / "prometheus",
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout


def queries():
    """Panel, expression and legend of every query of the dashboard."""
    dashboard = json.loads((HERE / "grafana/understudy.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"], target["legendFormat"]


def ask(address, expression, legend):
    """What is wrong with the answer, if anything, and its values."""
    expression = expression.replace("$__rate_interval", RATE_INTERVAL)
    query = urllib.parse.urlencode({"query": expression})
    try:
        result = get(address, f"/api/v1/query?{query}")["result"]
    except urllib.error.HTTPError as error:
        return json.load(error)["error"], []
    values = [float(series["value"][1]) for series in result]
    known = [value for value in values if not math.isnan(value)]
    absent = [label for label in re.findall(r"{{(\w+)}}", legend)
              if not all(label in series["metric"] for series in result)]
    if not known:
        return f"no answer: {values}", []
    return (f"the legend's labels {absent} are not there" if absent else None), known


def pair(folder):
    """A teacher, and in the place of a student the same network with a fifth of the steps."""
    bundled = ROOT / "models/zoo/fashion-mnist-teacher"
    for name, card in {
        "teacher": {"role": "teacher", "defaults": {"num_inference_steps": 50, "scheduler": "ddim"}},
        "student": {"role": "student", "teacher": "teacher",
                    "defaults": {"num_inference_steps": 10, "scheduler": "ddim"}},
    }.items():
        shutil.copytree(bundled, folder / name)
        file = folder / name / "understudy.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **card}))
    return folder


def traffic(base):
    """Pairs, single images, an experiment with votes, refusals and a client that leaves; the speed-ups that
    the API told."""
    speedups = []
    arms = [{"model": model, "weight": 1} for model in ("teacher", "student")]
    post(base, "/v1/experiments", {"id": "check", "arms": arms})
    until = time.monotonic() + TRAFFIC_SECONDS
    seed = 0
    while time.monotonic() < until:
        seed += 1
        speedups.append(post(base, "/v1/compare", {"seed": seed, "n": 2})["speedup"]["device"])
        for model in ("teacher", "student"):
            post(base, "/v1/images/generations",
                 {"model": model, "seed": seed, "deadline_ms": 60_000})
        post(base, "/v1/images/generations", {"model": "experiment:check", "user": str(seed)})
        pair = post(base, "/v1/experiments/check/pairs", {"seed": seed})
        post(base, "/v1/experiments/check/votes",
             {"pair_id": pair["pair_id"], "choice": seed % 2, "idempotency_key": str(seed)})
        time.sleep(0.5)  # idle, for a shadow
        # More at once than the queue holds.
        crowd = {"model": "teacher", "n": MAX_QUEUE, "num_inference_steps": 900, "stream": True}
        with send(base, "/v1/images/generations", crowd) as leaving:
            with contextlib.suppress(urllib.error.HTTPError):
                post(base, "/v1/images/generations", {"model": "student"})
            leaving.close()
    return speedups


def send(base, path, body):
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(base + path, json.dumps(body).encode(), headers)
    return urllib.request.urlopen(request, timeout=60)


def post(base, path, body):
    """The reply, once there is room for the request."""
    for _ in range(100):
        try:
            with send(base, path, body) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            if error.code != 429 or path != "/v1/compare":
                raise
            time.sleep(0.1)
    raise AssertionError("the queue stays full")


def get(address, path):
    with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as reply:
        return json.load(reply)["data"]


@contextlib.contextmanager
def server(program, models, folder):
    command = [program, "serve", "--port=0", f"--models={models}", "--default-model=teacher",
               f"--max-queue={MAX_QUEUE}", "--shadow-rate=1", f"--data-dir={folder}/state"]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        address = None
        for line in process.stdout:
            address = address or re.search(r"http://[^\s/]+", line)
            # It answers from the start, and has its models later.
            if line.startswith("Ready after"):
                yield address.group(0)
                break
        else:
            sys.exit(f"{program} ended early: {(folder / 'server.log').read_text()}")
    finally:
        process.terminate()
        process.wait(30)


@contextlib.contextmanager
def prometheus(base, folder):
    """Prometheus with this folder's configuration, told where the server is and to scrape every second."""
    shutil.copytree(HERE / "prometheus", folder / "prometheus")
    config = folder / "prometheus/prometheus.yaml"
    text = config.read_text()
    changed = text.replace("understudy:8080", base.removeprefix("http://"))
    changed = changed.replace("scrape_interval: 5s", "scrape_interval: 1s")
    assert changed.count("1s") == 1 and changed.count(base.removeprefix("http://")) == 1, text
    config.write_text(changed)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    process = subprocess.Popen([
        "prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address={address}", "--log.level=error",
    ])
    try:
        for _ in range(100):
            with contextlib.suppress(OSError):
                if urllib.request.urlopen(f"http://{address}/-/ready", timeout=5).status == 200:
                    break
            time.sleep(0.1)
        else:
            sys.exit("Prometheus does not start")
        yield address
    finally:
        process.terminate()
        process.wait(30)


if __name__ == "__main__":
    main()
