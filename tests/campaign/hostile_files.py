"""Files that were made to harm: each is refused by name within 10 s and 1 GB, or does no harm.

The address space is limited. A case fails on a signal, a panic, the time, the memory, or a message without the file
and what is wrong in it.
"""

import json
import os
import shutil
import socket
import stat
import struct

import hostile_archives
import hostile_pickles
from world import NETWORK, SCHEDULE, WEIGHTS

CARD = {
    "role": "teacher",
    "class_names": ["a", "b", "c"],
    "null_class": 2,
    "defaults": {"num_inference_steps": 2, "scheduler": "ddim"},
}
NOT_JSON = {
    "empty": b"",
    "cut short": b'{"_class_name": "UNet2D',
    "no text": bytes(range(256)) * 8,
    "an array": b"[]",
    "null": b"null",
    "a number": b"1e999",
    "a hundred thousand brackets": b"[" * 100_000,
    "a hundred thousand objects": b'{"a":' * 100_000,
    "a key twice": b'{"sample_size": 8, "sample_size": 16}',
    "a name of 8 MiB": b'{"' + b"x" * (8 << 20) + b'": 1}',
}
NUMBERS = [-1, 0, 1, 3, 0.5, 4096, 1_000_000, 2**31, 2**32 - 1, 2**53, 2**63, 2**64, 1e39, 1e308, -1e308]
OTHERS = [None, True, "x", "", [], {}, [0], [2**31], [8, -8], ["DownBlock2D"], "9" * 1000]


def cases(world):
    made = list(every_case(world))
    world.random.shuffle(made)
    yield from made


def every_case(world):
    yield from json_files(world)
    yield from safetensors(world)
    yield from special_sources(world)
    yield from special_targets(world)
    yield from judges(world)
    yield from hostile_archives.cases(world)
    yield from hostile_pickles.cases(world)


def sample(world, model):
    return world.run("sample", "--model", model, "--n", 1, "--steps", 1, "--threads", 1, "--out", world.folder_for("out") / "x.png")


def changed(world, file, content):
    """A model of which one file holds something else."""
    # Names of classes would be held against another network's.
    model = world.variant("m", card=CARD if file == "understudy.json" else {}, models=world.folder_for("hostile"))
    path = model / file
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    return model


def json_files(world):
    """Each JSON file of a model, broken as a whole and field by field."""
    for file, whole in [
        ("unet/config.json", NETWORK),
        ("scheduler/scheduler_config.json", SCHEDULE),
        ("understudy.json", CARD),
        ("model_index.json", None),
    ]:
        short = file.rpartition("/")[2]
        for name, content in NOT_JSON.items():
            def check(file=file, content=content, short=short):
                ended = sample(world, changed(world, file, content)).unharmed()
                assert ended.code == 0 or short in ended.said, f"does not name {short}: {ended.said}"
            yield f"{file}: {name}", check
        if whole is None:
            continue
        fields = list(whole) + {
            "unet/config.json": ["norm_eps", "freq_shift", "downsample_padding", "mid_block_scale_factor", "dropout", "act_fn"],
            "scheduler/scheduler_config.json": ["beta_start", "beta_end", "clip_sample_range", "steps_offset", "trained_betas", "dynamic_thresholding_ratio", "sample_max_value", "timestep_spacing", "prediction_type"],
            "understudy.json": ["teacher", "recipe", "scores"],
        }[file]
        for field in fields:
            for value in NUMBERS + OTHERS:
                def check(file=file, whole=whole, field=field, value=value, short=short):
                    content = json.dumps(whole | {field: value}).encode()
                    ended = sample(world, changed(world, file, content)).unharmed()
                    # Another size of the network shows at a tensor of the weights.
                    tensor = "diffusion_pytorch_model.safetensors" in ended.said and ".weight" in ended.said
                    file_named = short in ended.said or tensor
                    assert ended.code == 0 or file_named, f"does not name {short}: {ended.said}"
                    assert ended.code == 0 or field in ended.said or tensor, f"does not name {field}: {ended.said}"
                yield f"{file}: {field} {str(value)[:20]!r}", check
    for value in [0, -1, 2**31, 2**63, 1e308, "x", None]:
        for field in CARD["defaults"]:
            def check(field=field, value=value):
                content = json.dumps(CARD | {"defaults": CARD["defaults"] | {field: value}}).encode()
                ended = sample(world, changed(world, "understudy.json", content)).unharmed()
                # The command line says its own number of steps, so these defaults may do no harm.
                assert ended.code == 0 or ("understudy.json" in ended.said and field in ended.said), ended.said
            yield f"understudy.json: defaults.{field} {value!r}", check


def safetensors(world):
    """The weights: header, offsets and shapes that lie."""
    good = (world.models / "teacher" / WEIGHTS).read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    header, data = json.loads(good[8 : 8 + length]), good[8 + length :]
    name = next(key for key in header if key != "__metadata__")

    def with_header(changes, data=data):
        text = json.dumps(header | changes).encode()
        return struct.pack("<Q", len(text)) + text + data

    def sparse(size, header_length):
        def write(path):
            with open(path, "wb") as file:
                file.write(struct.pack("<Q", header_length))
                file.truncate(size)
        return write

    entry = header[name]
    begin, end = entry["data_offsets"]
    variants = {
        "empty": b"",
        "seven bytes": good[:7],
        "cut in the header": good[: length // 2],
        "cut in the data": good[:-1],
        "bytes after the data": good + b"x",
        "a header of 0 bytes": struct.pack("<Q", 0) + good[8:],
        "a header of 2^63 bytes": struct.pack("<Q", 2**63) + good[8:],
        "a header that is no JSON": struct.pack("<Q", length) + b"\xff" * length + data,
        "a header of brackets": struct.pack("<Q", 90_000) + b"[" * 90_000,
        "a sparse file of 90 GB": sparse(90 << 30, 90_000),
        "a sparse file of 90 GB that is all header": sparse(90 << 30, (90 << 30) - 8),
        "a shape whose product overflows": with_header({name: entry | {"shape": [2**40, 2**40]}}),
        "a negative shape": with_header({name: entry | {"shape": [-1, 8]}}),
        "a shape of 2^64": with_header({name: entry | {"shape": [2**64]}}),
        "a thousand dimensions": with_header({name: entry | {"shape": [1] * 1000}}),
        "offsets beyond the end": with_header({name: entry | {"data_offsets": [begin, 2**62]}}),
        "offsets that go back": with_header({name: entry | {"data_offsets": [end, begin]}}),
        "offsets that overlap": with_header({name: entry | {"data_offsets": [begin + 4, end + 4]}}),
        "an unknown type": with_header({name: entry | {"dtype": "F128"}}),
        "a type of integers": with_header({name: entry | {"dtype": "I32"}}),
        "a tensor without a name": with_header({"": entry}),
        "a tensor too many": with_header({"no.such.weight": entry}),
        "values that are no numbers": good[: 8 + length] + b"\xff" * len(data),
    }
    for case, content in variants.items():
        def check(content=content):
            sample(world, changed(world, WEIGHTS, content)).refused("diffusion_pytorch_model.safetensors")
        yield f"weights: {case}", check
    for seed in range(64):
        def check(seed=seed):
            random = type(world.random)(seed)
            content = bytearray(good)
            for _ in range(random.randrange(1, 8)):
                content[random.randrange(8 + length)] ^= 1 << random.randrange(8)
            ended = sample(world, changed(world, WEIGHTS, bytes(content))).unharmed()
            assert ended.code == 0 or "safetensors" in ended.said, ended.said
        yield f"weights: flipped bits {seed}", check


def make_special(kind, path):
    """Something at `path` that is no regular file; what to do when the case is over."""
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind in DEVICES:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(*DEVICES[kind]))
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as listener:
            here = os.getcwd()
            # A socket's path may have no more than 108 bytes.
            os.chdir(path.parent)
            try:
                listener.bind(path.name)
            finally:
                os.chdir(here)
    elif kind == "a folder":
        path.mkdir()
        (path / "kept").write_text("kept")
    elif kind == "a link to itself":
        path.symlink_to(path)
    else:
        path.symlink_to(kind)


# Made anew in the case's folder: what a fault removes is not the machine's own.
DEVICES = {"a device without end": (1, 5), "a device without content": (1, 3)} if os.getuid() == 0 else {}
SPECIAL = ["a FIFO", *DEVICES, "a socket", "a folder", "a link to itself", "/proc/self/maps", "/proc/kmsg", "/dev/zero"]


def special_sources(world):
    """Every flag that takes a file, given something that is none."""
    def model_file(file):
        def command(path):
            model = changed(world, file, lambda old: (old.unlink(), shutil.move(path, old)))
            return ["sample", "--model", model, "--n", 1, "--steps", 1, "--out", world.folder_for("out") / "x.png"]
        return command

    new = lambda: world.folder_for("out") / "new"  # noqa: E731
    evaluate = ("evaluate", "--features", "fashion-mnist-judge")
    sources = {
        "config.json": model_file("unet/config.json"),
        "scheduler_config.json": model_file("scheduler/scheduler_config.json"),
        "understudy.json": model_file("understudy.json"),
        "model_index.json": model_file("model_index.json"),
        "diffusion_pytorch_model.safetensors": model_file(WEIGHTS),
        "train --data": lambda path: ["train", "--data", path, "--config", world.folder / "network.json", "--out", new()],
        "train --config": lambda path: ["train", "--data", world.data, "--config", path, "--out", new()],
        "train --noise-schedule": lambda path: [*world.train_arguments(new(), 1)[:5], "--noise-schedule", path, "--out", new()],
        "distill --student": lambda path: ["distill", "--teacher", world.models / "teacher", "--student", path, "--out", new()],
        "import": lambda path: ["import", path, "--arch", world.arch, "--out", new()],
        "import --arch": lambda path: ["import", world.data, "--arch", path, "--out", new()],
        "evaluate --samples": lambda path: [*evaluate, "--samples", path, "--reference", world.samples],
        "evaluate --reference": lambda path: [*evaluate, "--samples", world.samples, "--reference", path],
        "evaluate --weights": lambda path: ["evaluate", "--features", "inception", "--weights", path, "--samples", world.samples, "--reference", world.samples],
    }
    for flag, command in sources.items():
        for kind in SPECIAL:
            for ending in ["x", "x.npz", "x.tar"] if flag.startswith(("train --data", "evaluate --s", "evaluate --r")) else ["x"]:
                def check(command=command, kind=kind, ending=ending, flag=flag):
                    path = world.folder_for("source") / ending
                    make_special(kind, path)
                    arguments = command(path)
                    # A folder is what --data, --samples, --student and a model's name may be: an empty one is refused, too.
                    world.run(*arguments).refused([ending, str(path), flag if flag.endswith(("json", "safetensors")) else ending])
                yield f"{flag} {kind} ({ending})", check


def special_targets(world):
    """Every flag that writes a file: what the program did not make is there afterwards, as it was."""
    evaluate = ("evaluate", "--samples", world.samples, "--reference", world.samples)
    targets = {
        "distill --pool-file": lambda path: world.distill_arguments(world.folder_for("out") / "new", 1, "--pool-file", path),
        "evaluate --out": lambda path: [*evaluate, "--out", path],
        "evaluate --write-stats": lambda path: [*evaluate, "--write-stats", path],
        "sample --out": lambda path: ["sample", "--model", world.models / "teacher", "--n", 1, "--steps", 1, "--out", path],
        "train --out": lambda path: world.train_arguments(path, 1),
        "distill --out": lambda path: world.distill_arguments(path, 1),
        "distill --keep-samples": lambda path: world.distill_arguments(world.folder_for("out") / "new", 1, "--keep-samples", path),
        "import --out": lambda path: ["import", world.data, "--arch", world.arch, "--out", path],
    }
    for flag, command in targets.items():
        for kind in ["a FIFO", *DEVICES, "a socket", "a folder", "a file of another program"]:
            # Into a folder one may sample; keeping samples in one is what the flag is for.
            if kind == "a folder" and flag in ("sample --out", "distill --keep-samples"):
                continue
            # A report of its own name is replaced by the next one.
            if kind == "a file of another program" and flag in ("evaluate --out", "evaluate --write-stats", "sample --out"):
                continue

            def check(command=command, kind=kind, flag=flag):
                path = world.folder_for("target") / "x.png"
                if kind == "a file of another program":
                    path.write_bytes(b"kept" * 1000)
                else:
                    make_special(kind, path)
                before = seen(path)
                ended = world.run(*command(path), seconds=20)
                assert seen(path) == before, f"{before} became {seen(path)}: {ended.said}"
                ended.refused(["x.png", str(path)])
            yield f"{flag} {kind}", check


def seen(path):
    """What lies at a path: kind, device number, content."""
    if not os.path.lexists(path):
        return "nothing"
    entry = path.lstat()
    content = path.read_bytes() if stat.S_ISREG(entry.st_mode) else sorted(os.listdir(path)) if path.is_dir() else None
    return stat.filemode(entry.st_mode), entry.st_rdev, content


def judges(world):
    """The configuration of a judge."""
    judge = {
        "name": "j", "channels": 1, "height": 32, "width": 32, "classes": 10, "test_accuracy": 0.9, "recipe": {},
        "layers": [{"channels": 8, "kernel": 3, "stride": 2}],
    }
    for field in [*judge, "layers.channels", "layers.kernel", "layers.stride"]:
        for value in [None, -1, 0, 1, 4096, 10**9, 2**63, 1e308, "x", []]:
            def check(field=field, value=value):
                folder = world.folder_for("judge")
                changed = dict(judge)
                outer, _, inner = field.partition(".")
                changed[outer] = [judge["layers"][0] | {inner: value}] if inner else value
                (folder / "config.json").write_text(json.dumps(changed))
                shutil.copy(world.models / "teacher" / WEIGHTS, folder / "model.safetensors")
                arguments = ["evaluate", "--samples", world.samples, "--reference", world.samples, "--features", folder]
                # The weights are of another network, so something is refused in any case.
                world.run(*arguments).refused(["config.json", "model.safetensors"])
            yield f"judge: {field} {value!r}", check
