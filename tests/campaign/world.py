"""What scenarios stand on: the program under limits, tiny models, and servers over them."""

import contextlib
import http.client
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time

MEBIBYTE = 1 << 20
# Of one process; a command over tiny models needs a tenth of either.
ADDRESS_BYTES = 3 << 30
MOST_BYTES = 1 << 30
MOST_SECONDS = 10
START_SECONDS = 60

# 8×8, gray, three classes; 20 times, so that a walk is short.
NETWORK = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "num_class_embeds": 3,
    "attention_head_dim": 4,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}
SCHEDULE = {"_class_name": "DDPMScheduler", "num_train_timesteps": 20, "beta_schedule": "squaredcos_cap_v2"}
# Steps of a request that outlives the case it is in.
ENDLESS = 20_000
SLOW_SCHEDULE = SCHEDULE | {"num_train_timesteps": ENDLESS}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


class Ended:
    """How a command ended."""

    def __init__(self, code, said, seconds, peak_bytes, too_slow):
        self.code, self.said, self.seconds = code, said, seconds
        self.peak_bytes, self.too_slow = peak_bytes, too_slow

    def unharmed(self):
        """It answered for itself: no signal, no panic, within time and memory."""
        assert not self.too_slow, f"still running after {self.seconds:.0f} s: {self.said[-300:]}"
        for word in ("panicked at", "stack backtrace", "memory allocation of", "overflowed its stack", "Bus error"):
            assert word not in self.said, f"{word!r}: {self.said}"
        assert self.code in (0, 1, 2), f"ended with {self.code}: {self.said}"
        assert self.peak_bytes <= MOST_BYTES, f"took {self.peak_bytes >> 20} MiB: {self.said}"
        return self

    def worked(self):
        self.unharmed()
        assert self.code == 0, f"refused: {self.said}"
        return self

    def refused(self, *names):
        """It said why: each of `names` is a word, or several of which one is enough."""
        self.unharmed()
        assert self.code != 0, f"taken for good: {self.said[-300:]}"
        for name in names:
            words = [name] if isinstance(name, str) else name
            assert any(word in self.said for word in words), f"names none of {words}: {self.said}"
        return self


class World:
    def __init__(self, program, folder):
        self.program, self.folder = program, folder
        self.random = None
        self.data = self.images(folder / "data-images-idx3-ubyte", range(12))
        # A judge's 128 features want more images than features.
        self.samples = self.images(folder / "samples-images-idx3-ubyte", range(130))
        self.arch = folder / "arch.json"
        self.arch.write_text(json.dumps({"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "num_head_channels": 32}))
        for name, content in [("network", NETWORK), ("schedule", SCHEDULE), ("slow-schedule", SLOW_SCHEDULE)]:
            (folder / f"{name}.json").write_text(json.dumps(content))
        self.models = folder / "models"
        self.models.mkdir()
        self.train(self.models / "teacher", steps=2).worked()
        self.variant("student", card={"role": "student", "teacher": "teacher"})
        self.variant("slow", schedule=SLOW_SCHEDULE)

    @property
    def bundled(self):
        """The folder of the bundled models: 32×32, a thousand times, 7 MB, as large as loading takes a while."""
        for parent in self.program.parents:
            if (parent / "models/zoo").is_dir():
                return parent / "models/zoo"
        raise AssertionError(f"no models/zoo above {self.program}")

    def folder_for(self, name):
        """A new, empty folder of a case."""
        return pathlib.Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))

    def images(self, path, values, size=8, labels=3):
        """An idx file of gray images, with labels beside it."""
        values = list(values)
        pixels = b"".join(bytes((value * 17 + pixel * 3) % 256 for pixel in range(size * size)) for value in values)
        path.write_bytes(struct.pack(">IIII", 0x803, len(values), size, size) + pixels)
        marks = bytes(index % labels for index in range(len(values)))
        beside = path.with_name(path.name.replace("images-idx3", "labels-idx1"))
        beside.write_bytes(struct.pack(">II", 0x801, len(values)) + marks)
        return path

    def variant(self, name, schedule=None, card=None, models=None):
        """A copy of the teacher with another schedule or card."""
        folder = (models or self.models) / name
        shutil.copytree(self.models / "teacher", folder, ignore=shutil.ignore_patterns("training"))
        if schedule:
            (folder / "scheduler/scheduler_config.json").write_text(json.dumps(schedule))
        if card is not None:
            (folder / "understudy.json").write_text(json.dumps(card))
        return folder

    def train_arguments(self, out, steps, *more):
        return [
            *("train", "--data", self.data, "--config", self.folder / "network.json"),
            *("--noise-schedule", self.folder / "schedule.json", "--out", out, "--steps", steps),
            *("--batch", 2, "--checkpoint-every", 2, "--sample-every", 0, "--threads", 1, "--learning-rate-schedule", "constant", *more),
        ]

    def distill_arguments(self, out, steps, *more):
        return [
            *("distill", "--teacher", self.models / "teacher", "--student", self.folder / "network.json"),
            *("--out", out, "--steps", steps, "--batch", 2, "--rho", 0.2, "--walk-steps", 10, "--no-report"),
            *("--checkpoint-every", 2, "--sample-every", 0, "--threads", 1, "--learning-rate-schedule", "constant", *more),
        ]

    def train(self, out, steps, *more, **how):
        return self.run(*self.train_arguments(out, steps, *more), **({"seconds": 60} | how))

    def distill(self, out, steps, *more, **how):
        return self.run(*self.distill_arguments(out, steps, *more), **({"seconds": 60} | how))

    def command(self, *arguments):
        return [str(self.program), *map(str, arguments)]

    def environment(self, **more):
        """No flag comes from outside, and nothing is fetched."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("UNDERSTUDY_", "HF_"))}
        own = {"HF_HOME": str(self.folder / "hub"), "HF_ENDPOINT": "http://127.0.0.1:9", "HOME": str(self.folder)}
        return kept | own | {"RUST_BACKTRACE": "0"} | {name: str(value) for name, value in more.items()}

    def run(self, *arguments, seconds=MOST_SECONDS, address_bytes=ADDRESS_BYTES, before=(), **environment):
        """A command to its end, behind the words `before`; what it said on both outputs."""
        with tempfile.TemporaryFile() as output:
            began = time.monotonic()
            process = subprocess.Popen(
                [*before, *self.command(*arguments)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.environment(**environment),
                cwd=self.folder,
                start_new_session=True,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (address_bytes, address_bytes)),
            )
            too_slow = threading.Event()

            def stop():
                too_slow.set()
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

            timer = threading.Timer(seconds, stop)
            timer.start()
            _, status, usage = os.wait4(process.pid, 0)
            timer.cancel()
            process.returncode = os.waitstatus_to_exitcode(status)
            took = time.monotonic() - began
            output.seek(0)
            said = output.read(MEBIBYTE).decode(errors="replace")
        return Ended(process.returncode, said, took, usage.ru_maxrss * 1024, too_slow.is_set())

    def serve(self, *flags, **how):
        return Server(self, flags, **how)


class Server:
    """A server on a free port, killed when its block ends."""

    def __init__(self, world, flags=(), models=None, limits=(), stderr=None, wait=True, **environment):
        self.world, self.wait, self.limits = world, wait, limits
        self.folder = world.folder_for("server")
        self.log = self.folder / "log"
        self.stderr = stderr
        self.port = free_port()
        # With a batch that is given, the warm-up tries no others: a server is there in a second.
        own = {"--models": models or world.models, "--threads": 2, "--data-dir": self.folder / "data", "--max-batch": 4}
        given = {str(flag).partition("=")[0] for flag in flags}
        own = [word for flag, value in own.items() if flag not in given for word in (flag, value)]
        self.arguments = ["serve", "--port", self.port, *own, *flags]
        self.environment = world.environment(**environment)

    def __enter__(self):
        def limit():
            for kind, most in self.limits:
                resource.setrlimit(kind, (most, most))

        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                self.world.command(*self.arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=self.stderr if self.stderr is not None else log,
                env=self.environment,
                preexec_fn=limit,
            )
        try:
            if self.wait:
                self.ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def ready(self):
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}: {self.said()}"
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.get("/health").status == 200:
                    return
            time.sleep(0.05)
        raise AssertionError(f"the server was not ready after {START_SECONDS} s: {self.said()}")

    def said(self):
        return self.log.read_text(errors="replace")

    def ask(self, method, path, body=None, headers=None, seconds=10):
        """One request on a connection of its own."""
        body = json.dumps(body) if isinstance(body, (dict, list)) else body
        headers = {"Content-Type": "application/json"} if headers is None and body is not None else headers or {}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            connection.request(method, path, body, headers)
            reply = connection.getresponse()
            return Reply(reply.status, dict(reply.getheaders()), reply.read())
        finally:
            connection.close()

    def get(self, path, **how):
        return self.ask("GET", path, **how)

    def post(self, path, body=None, **how):
        return self.ask("POST", path, body, **how)

    def image(self, model="teacher", seed=1, steps=2, **how):
        body = {"model": model, "seed": seed, "num_inference_steps": steps}
        headers = {"Content-Type": "application/json", "Accept": "image/png"}
        return self.ask("POST", "/v1/images/generations", body, headers, **how)

    def connect(self, seconds=10):
        return socket.create_connection(("127.0.0.1", self.port), timeout=seconds)

    def signal(self, number):
        self.process.send_signal(number)

    def ends(self, seconds):
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s: {self.said()[-300:]}") from None

    def lives(self, loading=False):
        """It runs, has not panicked, and answers: that it is ready or, where that may be, that it is loading."""
        assert self.process.poll() is None, f"the server ended with {self.process.returncode}: {self.said()[-600:]}"
        assert "panicked at" not in self.said(), self.said()[-600:]
        reply = self.get("/health", seconds=5)
        well = reply.status == 200 or loading and '"loading"' in reply.text()
        assert well, f"/health: {reply.status} {reply.text()}"

    def resident_bytes(self):
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) << 10


class Reply:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    def text(self):
        return self.body[:400].decode(errors="replace")

    def json(self):
        return json.loads(self.body)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def files(folder):
    """Every file below a folder, by its path, where numbers that depend on time or process are left out."""
    found = set()
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        found.add(re.sub(r"(tfevents)\..*", r"\1", name))
    return found
