#!/usr/bin/env python3
"""Traces of a real server in a real OpenTelemetry collector, rotel, which passes them on to where they are read.

    run.py [BINARY] [--rounds N] [--json FILE]

Starts BINARY (by default the newest of target/*/understudy) with the bundled models and three things are shown:

1. Every request that carries a `traceparent`, over HTTP and gRPC, is one trace below it, with the right parents, and
   nothing else is.
2. A collector that is away costs nothing: requests go on as fast as before, the log warns once, and says once that the
   collector takes spans again. A server that is stopped meanwhile ends in time.
3. Throughput with traces is that without: two servers, one with traces, take turns of two seconds under the same load, the
   student of four steps and eight requests at a time. Their processor time per image says the same where other programs run.
"""

import argparse
import concurrent.futures
import contextlib
import gzip
import http.client
import http.server
import json
import math
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid

import grpc
import rotel
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "deploy"))
from rolling import answers, free_ports, newest, until  # noqa: E402

AGENT = pathlib.Path(rotel.__file__).parent / "rotel-agent"
MODEL = "fashion-mnist-student-4"
CLIENTS = 8
GENERATE = "/v1/images/generations"
SECONDS = 2


class Sink:
    """Where the collector passes spans on to."""

    def __init__(self, port):
        self.spans = []
        sink = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                message = trace_service_pb2.ExportTraceServiceRequest.FromString(body)
                sink.spans += [
                    (resource.resource, span)
                    for resource in message.resource_spans
                    for scope in resource.scope_spans
                    for span in scope.spans
                ]
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Collector:
    """A rotel, which passes spans on to `sink`, or takes them and does nothing."""

    def __init__(self, folder, port, sink=None):
        grpc_port, = free_ports(1)
        self.port, self.process = port, None
        exporter = ["--exporter", "blackhole"]
        if sink:
            exporter = ["--exporter", "otlp", "--otlp-exporter-protocol", "http", "--otlp-exporter-endpoint", f"http://127.0.0.1:{sink}"]
        self.command = [
            *(AGENT, "start", "--pid-file", folder / f"rotel-{port}.pid", "--log-file", folder / f"rotel-{port}.log"),
            *("--otlp-http-endpoint", f"127.0.0.1:{port}", "--otlp-grpc-endpoint", f"127.0.0.1:{grpc_port}", *exporter),
        ]
        self.log = (folder / f"rotel-{port}.out").open("a")

    def start(self):
        self.process = subprocess.Popen(self.command, stdout=self.log, stderr=self.log)
        until(lambda: listens(self.port), "rotel does not start")

    def stop(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


def listens(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status > 0
    except OSError:
        return False
    finally:
        connection.close()


class Server:
    """An understudy with traces to a collector's port, or without."""

    def __init__(self, binary, folder, collector=None):
        self.port, = free_ports(1)
        self.log = folder / f"server-{self.port}.log"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
        environment["XDG_CACHE_HOME"] = str(folder / "cache")
        if collector:
            environment |= {
                "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector}",
                "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=test",
                "OTEL_BSP_SCHEDULE_DELAY": "500",
            }
        self.process = subprocess.Popen(
            [binary, "serve", "--port", str(self.port), "--data-dir", folder / str(self.port), "--models", ROOT / "models/zoo"],
            stdout=subprocess.DEVNULL, stderr=self.log.open("a"), env=environment,
        )

    def wait_until_ready(self):
        until(lambda: answers(f"http://127.0.0.1:{self.port}/health"), "the server does not become ready")

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        code = self.process.wait(60)
        if code:
            sys.exit(f"the server ended with {code}: {self.log.read_text()}")
        return time.monotonic() - began

    def ask(self, method, path, body=None, headers=()):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        body = None if body is None else json.dumps(body)
        connection.request(method, path, body, {"content-type": "application/json", **dict(headers)})
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        return reply.status, content

    def cpu_seconds(self):
        """Of the process, all threads."""
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def lines(self, words):
        return [line for line in self.log.read_text().splitlines() if words in line]


def parent():
    """A trace, and a span in it that asks."""
    return uuid.uuid4().hex, f"{random.getrandbits(63) + 1:016x}"


def attributes(span):
    return {it.key: getattr(it.value, it.value.WhichOneof("value")) for it in span.attributes}


def check_traces(server, sink):
    """What is shown first."""
    asked = {}

    def note(name, expected):
        trace, span = parent()
        asked[trace] = (name, span, expected)
        return {"traceparent": f"00-{trace}-{span}-01"}

    def post(path, body, expected, status=200):
        got, content = server.ask("POST", path, body, note(f"POST {path}" if "infer" not in path else "POST /v2/models/{model}/infer", expected))
        assert got == status, (path, got, content[:300])

    image = ["queue", "denoise", "encode image"]
    one = {f"generate_content {MODEL}": image}
    for seed in range(20):
        post(GENERATE, {"model": MODEL, "seed": seed}, one)
    post(GENERATE, {"model": MODEL, "n": 4}, {f"generate_content {MODEL}": 4 * image})
    post(GENERATE, {"model": MODEL, "stream": True, "partial_images": 1}, {f"generate_content {MODEL}": [*image, "encode image"]})
    pair = {f"generate_content fashion-mnist-{role}": image for role in ("teacher", "student")}
    post("/v1/compare", {"num_inference_steps": 4}, pair)
    text = ["queue", "encode prompt", "denoise", "decode latent", "encode image"]
    post(GENERATE, {"model": "emoji-text-to-image-student-4", "prompt": "a red apple", "seed": 1}, {"generate_content emoji-text-to-image-student-4": text})
    arms = [{"model": MODEL, "weight": 1}, {"model": "fashion-mnist-teacher", "weight": 0}]
    post("/v1/experiments", {"id": "traced", "arms": arms}, {}, 201)
    post(GENERATE, {"model": "experiment:traced"}, one)
    post(GENERATE, {"model": "nobody"}, {}, 404)
    tensor = lambda name, kind, shape, data: {"name": name, "datatype": kind, "shape": shape, "data": data}
    inputs = [
        tensor("sample", "FP32", [1, 1, 32, 32], [0.0] * 1024),
        tensor("timestep", "INT64", [1], [500]),
        tensor("class_labels", "INT64", [1], [0]),
    ]
    post("/v2/models/fashion-mnist-teacher/infer", {"inputs": inputs}, {"infer fashion-mnist-teacher": ["queue", "denoise"]})
    channel = grpc.insecure_channel(f"127.0.0.1:{server.port}")
    as_is = lambda message: message
    for method, message in (("ServerMetadata", b""), ("ModelMetadata", b"\x0a" + bytes([len(MODEL)]) + MODEL.encode())):
        method = f"inference.GRPCInferenceService/{method}"
        call = channel.unary_unary(f"/{method}", request_serializer=as_is, response_deserializer=as_is)
        assert call(message, metadata=list(note(method, {}).items()), timeout=60)
    # None of these is to be seen.
    for path in ("/health", "/metrics", "/", "/web/page.js", "/docs/", "/openapi.json", "/v2/health/live", "/nowhere"):
        trace, span = parent()
        server.ask("GET", path, headers={"traceparent": f"00-{trace}-{span}-01"})
    trace, span = parent()
    server.ask("POST", GENERATE, {"model": MODEL}, {"traceparent": f"00-{trace}-{span}-00"})

    expected = sum(1 + len(below) + sum(map(len, below.values())) for _, _, below in asked.values())
    until(lambda: len(sink.spans) >= expected, "spans are missing")
    time.sleep(2)
    assert len(sink.spans) == expected, (len(sink.spans), expected)
    found = {}
    for resource, span in sink.spans:
        said = {it.key: it.value.string_value for it in resource.attributes}
        assert said["service.name"] == "understudy" and said["deployment.environment.name"] == "test", said
        found.setdefault(span.trace_id.hex(), []).append(span)
    assert found.keys() == asked.keys()
    for trace, (name, span_id, below) in asked.items():
        spans = found[trace]
        children = lambda of: sorted((it for it in spans if it.parent_span_id == of), key=lambda it: it.start_time_unix_nano)
        root, = children(bytes.fromhex(span_id))
        assert (root.name, root.kind) == (name, 2), root
        works = children(root.span_id)
        assert sorted(work.name for work in works) == sorted(below), (name, works)
        for work in works:
            stages = children(work.span_id)
            assert sorted(it.name for it in stages) == sorted(below[work.name]), (name, stages)
            for outer, inner in [(root, work), *((work, stage) for stage in stages)]:
                assert outer.start_time_unix_nano <= inner.start_time_unix_nano <= inner.end_time_unix_nano <= outer.end_time_unix_nano
    arm = [attributes(span) for _, span in sink.spans if "understudy.experiment.arm" in attributes(span)]
    assert [(it["understudy.experiment.id"], it["understudy.experiment.arm"]) for it in arm] == [("traced", MODEL)], arm
    print(f"{len(asked)} requests, {len(found)} traces, {expected} spans, each below its parent", flush=True)
    return {"requests": len(asked), "traces": len(found), "spans": expected}


def latencies(server, count):
    """Milliseconds of requests from eight clients."""
    def one(seed):
        began = time.monotonic()
        status, content = server.ask("POST", GENERATE, {"model": MODEL, "seed": seed})
        assert status == 200, content[:300]
        return (time.monotonic() - began) * 1e3

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as clients:
        return sorted(clients.map(one, range(count)))


def check_outage(server, collector, sink):
    """What is shown second, all but the end."""
    latencies(server, 100)
    figures = {"up": [], "down": []}
    for _ in range(3):
        figures["up"] += latencies(server, 200)
        collector.stop()
        figures["down"] += latencies(server, 200)
        collector.start()
        until(lambda: len(server.lines("takes spans again")) == len(server.lines("takes no spans")), "the outage does not end")
    outages, ends = len(server.lines("takes no spans")), len(server.lines("takes spans again"))
    assert outages == ends and 1 <= outages <= 3, (outages, ends)
    before = len(sink.spans)
    server.ask("POST", GENERATE, {"model": MODEL})
    until(lambda: len(sink.spans) > before, "no spans after the outages")
    medians = {name: round(statistics.median(values), 2) for name, values in figures.items()}
    print(f"collector up: {medians['up']} ms, down: {medians['down']} ms; {outages} warnings for 3 outages", flush=True)
    return {"median_ms": medians, "warnings": outages, "outages": 3}


def throughput(binary, server, rate):
    """Images per second with eight requests under way at a time, where `rate` is more than that; and all images."""
    command = [
        *(binary, "load-test", "--url", f"http://127.0.0.1:{server.port}", "--mix", f"{MODEL}=1", "--json"),
        *("--connections", str(CLIENTS), "--rate", str(rate), "--duration", str(SECONDS)),
    ]
    run = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["runs"][0]
    figures, = run["models"]
    assert not figures["failed"] and not figures["refused_other"] and not figures["refused_429"], figures
    return figures["images_per_second"], figures["accepted"]


def measure(binary, without, traced, rounds):
    """What is shown third."""
    most = [throughput(binary, server, rate=600)[0] for server in (without, traced)]
    rate = round(1.3 * max(most))
    servers = {"off": without, "on": traced}
    figures, images = {"off": [], "on": []}, {"off": 0, "on": 0}
    before = {name: server.cpu_seconds() for name, server in servers.items()}
    for turn in range(rounds):
        for name in sorted(servers, reverse=turn % 2 == 0):
            a_second, made = throughput(binary, servers[name], rate)
            figures[name].append(round(a_second, 1))
            images[name] += made
    # The last spans are on their way.
    time.sleep(2)
    cpu = {name: 1e3 * (server.cpu_seconds() - before[name]) / images[name] for name, server in servers.items()}
    ratios = [on / off for on, off in zip(figures["on"], figures["off"])]
    ratio, middle, low, high = statistics.median(ratios), *interval(ratios)
    print(f"{rounds} rounds: off {statistics.median(figures['off']):.1f}, on {statistics.median(figures['on']):.1f} images/s (medians)", flush=True)
    print(f"on / off: median {ratio:.4f}, mean {middle:.4f} (95 %: {low:.4f} to {high:.4f})", flush=True)
    print(f"processor time of an image: off {cpu['off']:.3f}, on {cpu['on']:.3f} ms: {cpu['off'] / cpu['on']:.4f}", flush=True)
    return {"images_per_second": figures, "ratio": ratio, "mean_ratio": [middle, low, high], "cpu_ms": cpu, "cpu_ratio": cpu["off"] / cpu["on"]}


def interval(ratios):
    """Their geometric mean, and where it is with 95 % (normal approximation)."""
    logs = [math.log(ratio) for ratio in ratios]
    middle, error = statistics.fmean(logs), 1.96 * statistics.stdev(logs) / math.sqrt(len(logs))
    return [math.exp(value) for value in (middle, middle - error, middle + error)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", nargs="?")
    parser.add_argument("--rounds", type=int, default=60, help="turns of the third part; 0 leaves it out")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here")
    arguments = parser.parse_args()
    binary = arguments.binary or newest()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        folder = pathlib.Path(folder)
        port, sink_port, quiet_port = free_ports(3)
        sink = Sink(sink_port)
        collector = Collector(folder, port, sink_port)
        running.callback(collector.stop)
        collector.start()
        server = Server(binary, folder, port)
        running.callback(server.process.kill)
        server.wait_until_ready()
        report = {"traces": check_traces(server, sink), "outage": check_outage(server, collector, sink)}
        collector.stop()
        server.ask("POST", GENERATE, {"model": MODEL})
        report["outage"]["shutdown_seconds"] = round(server.stop(), 2)
        assert report["outage"]["shutdown_seconds"] < 5, report
        print(f"without a collector the server ends in {report['outage']['shutdown_seconds']} s", flush=True)

        if arguments.rounds:
            quiet = Collector(folder, quiet_port)
            running.callback(quiet.stop)
            quiet.start()
            servers = [Server(binary, folder), Server(binary, folder, quiet_port)]
            for each in servers:
                running.callback(each.process.kill)
                each.wait_until_ready()
            report["throughput"] = measure(binary, *servers, arguments.rounds)
            assert not servers[1].lines("takes no spans")
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2) + "\n")
        # A machine that does something else blurs throughput, so that is held against its interval.
        if arguments.rounds and min(report["throughput"]["mean_ratio"][2], report["throughput"]["cpu_ratio"]) < 0.99:
            sys.exit("traces cost more than a hundredth of the throughput")


if __name__ == "__main__":
    main()
