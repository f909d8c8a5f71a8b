#!/usr/bin/env python3
"""Real clients against a real server: openai, tritonclient, kserve, curl, Prometheus, schemathesis.

    run.py [BINARY | http://HOST:PORT] [--only NAME ...]

Starts BINARY (by default the newest of target/*/understudy) on a free port, or uses the server at
that address. Exits with 0 only if every client is content.
"""

import argparse
import asyncio
import base64
import contextlib
import json
import pathlib
import queue
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.request

import numpy
import openai
import tritonclient.http as triton

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
STEPS = 4


def png_size(data):
    """Width and height, from the header that every PNG begins with."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n", data[:16]
    return struct.unpack(">II", data[16:24])


def openai_client(base):
    return openai.OpenAI(base_url=f"{base}/v1", api_key="any", max_retries=0)


def model_with_classes(client):
    """The first model that draws classes: all its images are of one size."""
    return next(model.id for model in client.models.list().data if model.model_extra["class_names"])


def check_openai(base):
    """images.generate, models.list, and errors as the package's own exceptions."""
    client = openai_client(base)
    model = model_with_classes(client)
    reply = client.images.generate(
        model=model, prompt="Sneaker", n=2, size="auto",
        extra_body={"seed": 7, "num_inference_steps": STEPS},
    )
    images = [base64.b64decode(image.b64_json) for image in reply.data]
    assert len(images) == 2 and images[0] != images[1]
    width, height = png_size(images[0])
    jpeg = client.images.generate(
        model=model, prompt="", output_format="jpeg", extra_body={"num_inference_steps": STEPS}
    )
    assert base64.b64decode(jpeg.data[0].b64_json).startswith(b"\xff\xd8\xff")
    for error, fields in [
        (openai.NotFoundError, {"model": "no-such-model"}),
        (openai.BadRequestError, {"model": model, "size": "1024x1024"}),
    ]:
        try:
            client.images.generate(prompt="Sneaker", **fields)
        except error as refused:
            assert refused.body["message"], refused
        else:
            raise AssertionError(f"{fields} was not refused")
    return f"2 images of {width}x{height} from {model}"


def check_readme(base):
    """README.md's Python, as it stands."""
    text = (ROOT / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace("http://127.0.0.1:8080", base), names)
    images = [base64.b64decode(image.b64_json) for image in names["reply"].data]
    assert len(images) == 4 and all(png_size(image) for image in images)
    return f"{len(images)} images"


def check_openai_stream(base):
    """Partial images arrive in order; the completed one is the image of a plain request."""
    client = openai_client(base)
    model = model_with_classes(client)
    fields = dict(
        model=model, prompt="Coat", n=1, extra_body={"seed": 3, "num_inference_steps": 8}
    )
    plain = client.images.generate(**fields).data[0].b64_json
    events = list(client.images.generate(**fields, stream=True, partial_images=2))
    kinds = [event.type.removeprefix("image_generation.") for event in events]
    assert kinds == ["partial_image", "partial_image", "completed"], kinds
    assert [event.partial_image_index for event in events[:-1]] == [0, 1]
    for event in events:
        png_size(base64.b64decode(event.b64_json))
    assert events[-1].b64_json == plain
    return "2 partial images, then the image of a plain request"


def check_tritonclient(base):
    """Health, metadata, inference in JSON and binary, and the repository."""
    client = triton.InferenceServerClient(base.removeprefix("http://"))
    assert client.is_server_live() and client.is_server_ready()
    name = next(model["name"] for model in client.get_model_repository_index())
    assert client.get_server_metadata()["name"]
    assert client.is_model_ready(name) and not client.is_model_ready("no-such-model")
    metadata = {tensor["name"]: tensor for tensor in client.get_model_metadata(name)["inputs"]}

    batch, shape = 3, metadata["sample"]["shape"][1:]
    values = {
        "sample": numpy.random.default_rng(0).standard_normal((batch, *shape)).astype("float32"),
        "timestep": numpy.array([10, 500, 999], "int64"),
        "class_labels": numpy.array([0, 1, 2], "int64"),
    }
    answers = []
    for binary in [False, True]:
        inputs = []
        for tensor in metadata:
            value = values[tensor]
            kind = triton.InferInput(tensor, list(value.shape), metadata[tensor]["datatype"])
            kind.set_data_from_numpy(value.astype(triton.triton_to_np_dtype(kind.datatype())),
                                     binary_data=binary)
            inputs.append(kind)
        outputs = [triton.InferRequestedOutput("noise_pred", binary_data=binary)]
        reply = client.infer(name, inputs, outputs=outputs, request_id="me")
        assert reply.get_response()["id"] == "me"
        answers.append(reply.as_numpy("noise_pred"))
    assert answers[0].shape == (batch, *shape), answers[0].shape
    assert numpy.isfinite(answers[0]).all() and (answers[0] == answers[1]).all()
    # Without naming outputs tritonclient asks for all of them in binary.
    everything = client.infer(name, inputs).as_numpy("noise_pred")
    assert (everything == answers[0]).all()

    client.unload_model(name)
    assert not client.is_model_ready(name)
    client.load_model(name)
    assert client.is_model_ready(name)
    return f"{name}: {answers[0].shape} alike in JSON and binary; unloaded and loaded"


def inference_inputs(base, name, batch=3):
    """Metadata and values of a network's inputs, by name."""
    client = triton.InferenceServerClient(base.removeprefix("http://"))
    metadata = {tensor["name"]: tensor for tensor in client.get_model_metadata(name)["inputs"]}
    values = {
        "sample": numpy.random.default_rng(0).standard_normal(
            (batch, *metadata["sample"]["shape"][1:])).astype("float32"),
        "timestep": numpy.linspace(10, 999, batch).astype("int64"),
        "class_labels": numpy.arange(batch, dtype="int64"),
    }
    return metadata, {tensor: values[tensor] for tensor in metadata}


def over_http(base, name, values, metadata):
    """The network's answer over HTTP, in binary."""
    client = triton.InferenceServerClient(base.removeprefix("http://"))
    inputs = []
    for tensor, value in values.items():
        kind = triton.InferInput(tensor, list(value.shape), metadata[tensor]["datatype"])
        kind.set_data_from_numpy(value, binary_data=True)
        inputs.append(kind)
    return client.infer(name, inputs).as_numpy("noise_pred")


def check_tritonclient_grpc(base):
    """The same over gRPC, on the same port: the same answers to the bit, and errors by their codes."""
    import grpc
    import tritonclient.grpc as triton_grpc

    client = triton_grpc.InferenceServerClient(base.removeprefix("http://"))
    assert client.is_server_live() and client.is_server_ready()
    assert client.get_server_metadata().name == "understudy"
    name = model_with_classes(openai_client(base))
    assert client.is_model_ready(name) and client.is_model_ready(name, "1")
    about = client.get_model_metadata(name)
    metadata, values = inference_inputs(base, name)
    assert [it.name for it in about.inputs] == list(metadata)
    assert [list(it.shape) for it in about.inputs] == [it["shape"] for it in metadata.values()]

    def inputs():
        for tensor, value in values.items():
            kind = triton_grpc.InferInput(tensor, list(value.shape), metadata[tensor]["datatype"])
            kind.set_data_from_numpy(value)
            yield kind

    outputs = [triton_grpc.InferRequestedOutput("noise_pred")]
    expected = over_http(base, name, values, metadata)
    reply = client.infer(name, list(inputs()), outputs=outputs, request_id="me", client_timeout=60)
    assert reply.get_response().id == "me"
    assert (reply.as_numpy("noise_pred") == expected).all()
    # Eight at a time over one connection.
    done = queue.Queue()
    for _ in range(8):
        client.async_infer(name, list(inputs()), lambda result, error: done.put((result, error)))
    for _ in range(8):
        result, error = done.get(timeout=60)
        assert error is None, error
        assert (result.as_numpy("noise_pred") == expected).all()

    def code(ask):
        try:
            ask()
        except triton_grpc.InferenceServerException as refused:
            return refused.status(), refused.message()
        raise AssertionError("not refused")

    status, message = code(lambda: client.infer("no-such-model", list(inputs())))
    assert status == "StatusCode.NOT_FOUND" and "no-such-model" in message, (status, message)
    status, message = code(lambda: client.infer(name, list(inputs())[:1]))
    assert status == "StatusCode.INVALID_ARGUMENT" and "timestep" in message, (status, message)
    for ask in [client.get_inference_statistics, lambda: client.get_model_config(name)]:
        assert code(ask)[0] == "StatusCode.UNIMPLEMENTED"

    assert name in [model.name for model in client.get_model_repository_index().models]
    client.unload_model(name)
    assert not client.is_model_ready(name)
    assert code(lambda: client.infer(name, list(inputs())))[0] == "StatusCode.UNAVAILABLE"
    client.load_model(name)
    assert client.is_model_ready(name)

    channel = grpc.insecure_channel(base.removeprefix("http://"))
    health = channel.unary_unary("/grpc.health.v1.Health/Check")(b"")
    assert health == b"\x08\x01", health  # SERVING
    return f"{name}: {expected.shape} as over HTTP to the bit, 8 at a time; unloaded and loaded"


def check_kserve(base):
    """KServe's own client over gRPC, in a process of its own: its messages have the names of tritonclient's."""
    name = model_with_classes(openai_client(base))
    command = [sys.executable, "-c", "import run, sys; run.ask_kserve(*sys.argv[1:])", base, name]
    done = subprocess.run(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()[-1]


def ask_kserve(base, name):
    """The same answers as over HTTP, for elements in binary and in the fields of their types."""
    import kserve

    metadata, values = inference_inputs(base, name)
    expected = over_http(base, name, values, metadata)

    async def ask():
        async with kserve.InferenceGRPCClient(base.removeprefix("http://")) as client:
            assert await client.is_server_live() and await client.is_server_ready()
            assert await client.is_model_ready(name)
            for binary in [False, True]:
                inputs = []
                for tensor, value in values.items():
                    kind = metadata[tensor]["datatype"]
                    one = kserve.InferInput(tensor, list(value.shape), kind)
                    one.set_data_from_numpy(value, binary_data=binary)
                    inputs.append(one)
                reply = await client.infer(kserve.InferRequest(name, inputs))
                assert (reply.outputs[0].as_numpy() == expected).all(), binary

    asyncio.run(ask())
    print(f"{name}: {expected.shape} as over HTTP to the bit")


def check_curl(base):
    """An image as the body, its seed in a header."""
    body = json.dumps({"prompt": "Bag", "seed": 5, "num_inference_steps": STEPS})
    command = [
        "curl", "--silent", "--show-error", "--fail", "--include", "--data", body,
        "--header", "Content-Type: application/json", "--header", "Accept: image/png",
        f"{base}/v1/images/generations",
    ]
    reply = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    head, image = reply.split(b"\r\n\r\n", 1)
    head = head.decode().lower()
    assert "\r\ncontent-type: image/png" in head, head
    assert "\r\nx-understudy-seed: 5\r\n" in head + "\r\n" and "x-understudy-model:" in head, head
    width, height = png_size(image)
    again = openai_client(base).images.generate(prompt="Bag", extra_body=json.loads(body))
    assert base64.b64decode(again.data[0].b64_json) == image
    return f"{width}x{height}, {len(image)} bytes, the same as in JSON"


def check_promtool(base):
    """`promtool check metrics` finds nothing to say."""
    with urllib.request.urlopen(f"{base}/metrics") as reply:
        text = reply.read()
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=text, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert checked.returncode == 0 and not checked.stdout.strip(), checked.stdout.decode()
    return f"{len(re.findall(rb'^# TYPE', text, re.M))} metrics"


def check_prometheus(base):
    """Prometheus scrapes the server and answers questions about it."""
    openai_client(base).images.generate(prompt="Bag", extra_body={"num_inference_steps": STEPS})
    with tempfile.TemporaryDirectory() as folder:
        config = pathlib.Path(folder, "prometheus.json")  # JSON is YAML
        target = {"targets": [base.removeprefix("http://")]}
        config.write_text(json.dumps({"scrape_configs": [
            {"job_name": "understudy", "scrape_interval": "1s", "static_configs": [target]},
        ]}))
        address = f"127.0.0.1:{free_port()}"
        command = [
            "prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address={address}", "--log.level=error",
        ]
        process = subprocess.Popen(command)
        try:
            def query(expression):
                url = f"http://{address}/api/v1/query?query={urllib.request.quote(expression)}"
                with urllib.request.urlopen(url) as reply:
                    return json.load(reply)["data"]["result"]

            def value(expression):
                def found():
                    with contextlib.suppress(OSError):
                        return query(expression)
                return float(wait_for(found, f"prometheus has no {expression}")[0]["value"][1])

            assert value("up") == 1
            images = value("sum(understudy_images_total)")
            assert images >= 1
            for name in [
                "understudy_http_requests_total", "understudy_request_duration_seconds_count",
                "understudy_queue_duration_seconds_count", "understudy_model_info",
                "understudy_device_duration_seconds_count", "understudy_build_info",
                "understudy_evaluation_duration_seconds_count", "understudy_batch_samples_count",
                "process_resident_memory_bytes",
            ]:
                assert value(f"sum({name})") > 0, name
            assert value("sum(understudy_samples_waiting + understudy_samples_running)") == 0
            batch = value("sum(understudy_batch_samples_sum) / sum(understudy_batch_samples_count)")
        finally:
            process.terminate()
            process.wait()
    return f"{images:.0f} images, mean batch {batch:.2f}"


def check_schemathesis(base):
    """The whole OpenAPI document, valid and invalid requests, without a failure."""
    # Once nothing is loaded, little is tested: first without unloading.
    return f"{schemathesis(base, '--exclude-operation-id=unload')}, and whole: {schemathesis(base)}"


def schemathesis(base, *options):
    command = [
        str(pathlib.Path(sys.executable).parent / "schemathesis"),
        f"--config-file={HERE / 'schemathesis.toml'}", "run", "--no-color",
        "--generation-database=none", *options, f"{base}/openapi.json",
    ]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}"
    return re.search(r"\d+ generated", done.stdout).group(0)


def check_openai_edit(base):
    """images.edit with a file; the same seed makes the same image."""
    client = openai_client(base)
    model = model_with_classes(client)
    plain = client.images.generate(model=model, prompt="Coat", extra_body={"seed": 3, "num_inference_steps": 8})
    picture = base64.b64decode(plain.data[0].b64_json)
    fields = dict(
        model=model, prompt="Bag", image=("coat.png", picture, "image/png"),
        extra_body={"seed": 4, "num_inference_steps": 10, "strength": 0.6},
    )
    first, again = (client.images.edit(**fields).data[0].b64_json for _ in range(2))
    assert first == again and png_size(base64.b64decode(first)) == png_size(picture)
    try:
        client.images.edit(**fields | {"image": ("coat.png", b"no image", "image/png")})
    except openai.BadRequestError as refused:
        assert "PNG" in refused.body["message"], refused
    else:
        raise AssertionError("what is no image was not refused")
    return f"an image of another, by {model}"


def check_webuiapi(base):
    """A1111's API by a client of it: lists, txt2img, img2img, and what is refused."""
    import webuiapi

    model = model_with_classes(openai_client(base))
    api = webuiapi.WebUIApi(baseurl=f"{base}/sdapi/v1", sampler="DDIM", steps=STEPS)
    assert model in api.util_get_model_names() and "Euler a" in api.util_get_sampler_names()
    assert api.util_get_current_model() in api.util_get_model_names()
    assert api.get_progress()["progress"] == 0.0
    side = int(next(it for it in openai_client(base).models.list().data if it.id == model).model_extra["size"].split("x")[0])
    fields = dict(prompt="Coat", seed=7, cfg_scale=1.0, width=side, height=side, override_settings={"sd_model_checkpoint": model})
    made = api.txt2img(batch_size=2, **fields)
    assert len(made.images) == 2 and made.images[0].size == (side, side), made.images
    assert made.info["all_seeds"] == [7, 8] and made.info["sd_model_name"] == model, made.info
    begun = api.img2img(images=[made.image], denoising_strength=0.5, **fields)
    assert begun.image.size == (side, side) and begun.image.tobytes() != made.image.tobytes()
    try:
        api.txt2img(enable_hr=True, **fields)
    except RuntimeError as refused:
        assert "enable_hr" in str(refused), refused
    else:
        raise AssertionError("enable_hr was not refused")
    return f"3 images of {side}x{side} from {model}"


# schemathesis last: it may leave models unloaded.
CHECKS = [check_openai, check_openai_edit, check_webuiapi, check_readme, check_openai_stream, check_tritonclient, check_tritonclient_grpc,
          check_kserve, check_curl,
          check_promtool, check_prometheus, check_schemathesis]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(attempt, problem, seconds=60):
    """What `attempt` returns once it is something."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if result := attempt():
            return result
        time.sleep(0.2)
    raise AssertionError(f"{problem} after {seconds} s")


def is_healthy(base):
    """Whether all models are ready."""
    try:
        return urllib.request.urlopen(f"{base}/health").status == 200
    except OSError:
        return False


@contextlib.contextmanager
def server(where):
    """The address of the server at `where`, started if that is a program."""
    if where and where.startswith("http"):
        yield where.rstrip("/")
        return
    built = sorted(ROOT.glob("target/*/understudy"), key=lambda path: path.stat().st_mtime)
    program = where or (built and str(built[-1]))
    if not program:
        sys.exit("no target/*/understudy: run `cargo build --release` first, or name a binary")
    # A thousand steps of many images would take minutes; out of time (504) is as good an answer, if
    # it comes before schemathesis' own limit of 10 s. It loads models by the hundred, and few sizes of
    # batches to warm up with make that quick.
    kept = tempfile.TemporaryDirectory(prefix="understudy-clients-")
    command = [program, "serve", "--port=0", f"--data-dir={kept.name}", "--max-images-per-request=4",
               "--request-timeout-seconds=5", "--max-batch=4"]
    log_path = pathlib.Path(tempfile.gettempdir(), "understudy-clients.log")
    with log_path.open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        for line in process.stdout:
            if address := re.search(r"http://[^\s/]+", line):
                wait_for(lambda: is_healthy(address.group(0)), "not healthy")
                yield address.group(0)
                break
        else:
            sys.exit(f"{program} ended early; see {log_path}")
        assert process.poll() is None, f"the server ended with {process.returncode}"
    finally:
        process.terminate()
        code = process.wait(30)
        kept.cleanup()
        assert code == 0, f"the server ended with {code}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("server", nargs="?", help="binary or address")
    names = [check.__name__.removeprefix("check_") for check in CHECKS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    arguments = parser.parse_args()
    failed = []
    with server(arguments.server) as base:
        for check in CHECKS:
            name = check.__name__.removeprefix("check_")
            if name not in arguments.only:
                continue
            began = time.monotonic()
            try:
                said = check(base)
            except Exception as error:
                failed.append(name)
                if not isinstance(error, AssertionError):
                    traceback.print_exc()
                said = f"FAILED: {error}"
            print(f"{name:14} {time.monotonic() - began:6.1f} s  {said}", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
