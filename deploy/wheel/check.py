#!/usr/bin/env python3
"""The wheel, as somebody without Rust has it: `pip install`, `understudy`, an image through the openai package.

    deploy/wheel/check.py [WHEEL]

Without WHEEL, builds one with maturin, which it installs into an environment of its own (about eight minutes on two cores). Installs
it and `openai` into a fresh environment and starts `understudy` in an empty folder, so that nothing but the wheel can have the
models. Exits with 0 only if they are found in the wheel's files and the image is one. Needs Python, a network for PyPI, and,
to build, a Rust toolchain.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import urllib.request
import venv
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
DRAWS = """
import base64, sys, openai
client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="any", max_retries=0)
image = client.images.generate(model="fashion-mnist-student-4", prompt="Sneaker", extra_body={"seed": 7})
sys.stdout.buffer.write(base64.b64decode(image.data[0].b64_json))
"""


def main():
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        wheel = pathlib.Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else built(folder)
        contents(wheel)
        home = environment(folder / "installed", wheel, "openai")
        program = home / "bin/understudy"
        models(program, home, folder)
        pages(program, folder)
        with server(program, folder) as base:
            drawn = subprocess.run([home / "bin/python", "-c", DRAWS, base], check=True, capture_output=True).stdout
        assert drawn[:8] == b"\x89PNG\r\n\x1a\n", drawn[:16]
        print(f"drawn: {struct.unpack('>II', drawn[16:24])} pixels, {len(drawn)} bytes")
    print("all is well")


def environment(folder, *packages):
    """A fresh environment with these packages."""
    venv.create(folder, with_pip=True)
    subprocess.run([folder / "bin/python", "-m", "pip", "install", "--quiet", *packages], check=True)
    return folder


def built(folder):
    home = environment(folder / "maturin", "maturin")
    data = ROOT / "target/wheel"
    shutil.rmtree(data, ignore_errors=True)
    shutil.copytree(ROOT / "models/zoo", data / "data/share/understudy/models/zoo")
    command = [home / "bin/maturin", "build", "--release", "--out", folder / "wheels"]
    subprocess.run(command, check=True, cwd=ROOT)
    [wheel] = (folder / "wheels").glob("*.whl")
    return wheel


def contents(wheel):
    """Every file of the bundled models is in it, byte for byte, and nothing that is not the program's."""
    zoo = ROOT / "models/zoo"
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        place = next(name for name in names if name.endswith("fashion-mnist-teacher/model_index.json"))
        prefix = place.removesuffix("fashion-mnist-teacher/model_index.json")
        assert re.fullmatch(r"understudy-[^/]+\.data/data/share/understudy/models/zoo/", prefix), prefix
        ours = {path.relative_to(zoo).as_posix(): path.read_bytes() for path in zoo.rglob("*") if path.is_file()}
        there = {name.removeprefix(prefix): files.read(name) for name in names if name.startswith(prefix)}
        there = {name: data for name, data in there.items() if not name.endswith("/")}
        assert there == ours, set(there) ^ set(ours)
        others = [name for name in names if not name.startswith(prefix) and ".dist-info/" not in name]
        scripts = [name for name in others if name.endswith("/scripts/understudy")]
        assert len(scripts) == 1 and not [name for name in others if name not in scripts and not name.endswith("/")], others
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {len(ours)} files of models")


def models(program, home, folder):
    """They are found in the environment, whatever the working folder is."""
    listed = subprocess.run([program, "models", "--json"], check=True, capture_output=True, text=True, cwd=folder).stdout
    zoo = (home / "share/understudy/models/zoo").resolve()
    assert str(zoo) in listed, listed
    print(f"models: in {zoo.relative_to(home.resolve())}")


def pages(program, folder):
    """Manual pages that man-db takes, where there is one."""
    subprocess.run([program, "man", folder / "man1"], check=True)
    written = sorted(path.name for path in (folder / "man1").iterdir())
    assert {"understudy.1", "understudy-serve.1", "understudy-distill.1"} <= set(written), written
    print(f"man: {len(written)} pages")


@contextlib.contextmanager
def server(program, folder):
    """`understudy` alone, in an empty folder."""
    empty = folder / "empty"
    empty.mkdir()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("UNDERSTUDY_")}
    environment = clean | {"HOME": str(empty), "UNDERSTUDY_PORT": "0"}
    process = subprocess.Popen([program], stdout=subprocess.PIPE, text=True, cwd=empty, env=environment)
    try:
        address = None
        for line in process.stdout:
            address = address or re.search(r"http://[^\s/]+", line)
            if line.startswith("Ready after"):
                break
        else:
            sys.exit("understudy ended early")
        base = address.group(0)
        with urllib.request.urlopen(f"{base}/v1/models", timeout=60) as reply:
            ids = [model["id"] for model in json.load(reply)["data"]]
        assert {"fashion-mnist-teacher", "fashion-mnist-student"} <= set(ids), ids
        print(f"serves {', '.join(ids)}")
        yield base
    finally:
        process.terminate()
        process.wait(60)


if __name__ == "__main__":
    main()
