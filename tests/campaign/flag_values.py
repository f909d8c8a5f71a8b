"""Every number that a flag takes, at 0, 1 and as large as it can be: used, or refused by the flag's name."""

import contextlib
import re
import signal

# What a flag may be given; the largest values of the types behind them, and what rounds to no number.
VALUES = ["0", "1", "-1", "255", "65535", "65536", "4294967295", "4294967296", "9007199254740992",
          "9223372036854775807", "9223372036854775808", "18446744073709551615", "18446744073709551616",
          "1e308", "-1e308", "inf", "NaN", "1e-320", "0.5", ""]
COMMANDS = ["serve", "sample", "bench", "train", "distill", "evaluate", "train-judge", "load", "health"]
# What help shows for a value that is no number.
NO_NUMBER = {"DIR", "FILE", "PATH", "MODEL", "MODEL-OR-CONFIG", "ID", "KEY", "ORIGIN", "TEACHER", "NETWORK", "SAMPLER", "HOST",
             "DEVICE", "DTYPE", "URL", "FROM", "SCHEDULER", "OUT", "ARCH", "PREDICTION", "FEATURES", "MIX", "LOG_FORMAT"}


def cases(world):
    made = []
    for command in COMMANDS:
        flags = numeric(world, command)
        yield f"{command}: its numbers are found", lambda f=flags, c=command: found(c, f)
        for flag in flags:
            for value in VALUES:
                made.append((f"{command} {flag} {value!r}", lambda c=command, f=flag, v=value: given(world, c, f, v)))
    world.random.shuffle(made)
    yield from made


def numeric(world, command):
    """The command's flags that take a number, off its help: not a path, a name, or one of some words."""
    text = world.run(command, "--help").worked().said
    flags = []
    for match in re.finditer(r"^ +(?:-\w, )?(--[a-z0-9-]+)[ =]<([^>]+)>(.*?)(?=^ +(?:-\w, )?--|\Z)", text, re.M | re.S):
        flag, value, about = match.groups()
        default = re.search(r"\[default: ([^\]]*)\]", about)
        words = "[possible values:" in about or "Possible values:" in about
        named = default and not re.fullmatch(r"[-+.\de]+", default[1]) and value in NO_NUMBER
        if value not in NO_NUMBER and "=" not in value and not words and not named:
            flags.append(flag)
    return flags


def found(command, flags):
    assert flags, f"{command} --help shows no number"


def arguments(world, command, port):
    out = world.folder_for("out")
    evaluate = ["evaluate", "--model", world.models / "teacher", "--reference", world.samples, "--n", 150, "--steps", 1]
    return {
        "serve": ["serve", "--port", 0, "--models", world.models, "--data-dir", out / "data"],
        "sample": ["sample", "--model", world.models / "teacher", "--n", 1, "--steps", 1, "--out", out / "x.png"],
        "bench": ["bench", "--model", world.models / "teacher", "--steps", 1, "--seconds", 1],
        "train": world.train_arguments(out / "new", 2),
        "distill": world.distill_arguments(out / "new", 2),
        "evaluate": evaluate,
        "train-judge": ["train-judge", "--data", world.samples, "--test-data", world.samples, "--out", out / "new", "--epochs", 1, "--least-accuracy", 0],
        "load": ["load", "--url", f"http://127.0.0.1:{port}", "--duration", 1, "--rate", 1, "--mix", "teacher=1", "--steps", 1],
        "health": ["health", "--port", port],
    }[command]


def given(world, command, flag, value):
    if command == "serve" and flag != "--port":
        return serves(world, flag, value)
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(world.serve()).port if command in ("load", "health") else 9
        words = [str(word) for word in arguments(world, command, port)]
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
        # A run that is asked for more than can be done in a while is one that was taken.
        ended = world.run(*words, f"{flag}={value}", seconds=8)
        if ended.too_slow:
            ended.too_slow, ended.code = False, 0
        # Memory for a large batch is what was asked for.
        ended.peak_bytes = 0 if flag == "--batch" else ended.peak_bytes
        ended.unharmed()
        names = (flag[2:], flag[2:].replace("-", "_"))
        # A server that is not there is what `health` is asked for; a rate that is too high shows in the loss.
        told = any(name in ended.said for name in names) or command == "health" or "not finite" in ended.said
        assert ended.code == 0 or told, f"does not name {flag}: {ended.said}"


def serves(world, flag, value):
    """Refused by name, or it starts, answers, and stops when it is told to."""
    with world.serve(f"{flag}={value}", wait=False) as server:
        with contextlib.suppress(AssertionError):
            server.ready()
        said, code = server.said(), server.process.poll()
        assert "panicked at" not in said and code in (None, 0, 1, 2), f"{code}: {said}"
        if code is not None:
            assert flag in said, f"does not name {flag}: {said}"
            return
        reply = server.image(seconds=20)
        assert reply.status in (200, 400, 401, 413, 429, 503, 504), f"{reply.status} {reply.text()}"
        server.signal(signal.SIGTERM)
        assert server.ends(15) == 0, server.said()
        assert "panicked at" not in server.said(), server.said()
