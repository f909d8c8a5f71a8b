#!/usr/bin/env python3
"""Starts an unpacked image as a cluster would, and asks it for a picture.

    start.py ROOT CONFIG FOLDER

ROOT is the image's file system, CONFIG what `buildah inspect` says of it, FOLDER takes the picture.
crun runs it: root file system read-only, no capabilities, no new privileges, a process id space of its own. Prints
what it saw, and ends with 1 if anything was not as promised.
"""

import http.client
import json
import os
import pathlib
import random
import socket
import stat
import subprocess
import sys
import tempfile
import time

NAMESPACES = ["pid", "mount", "ipc", "uts"]
NOTHING = {kind: [] for kind in ("bounding", "effective", "inheritable", "permitted", "ambient")}
START_SECONDS = 120


def main():
    root, config, folder = (pathlib.Path(argument).resolve() for argument in sys.argv[1:])
    image = json.loads(config.read_text())["OCIv1"]["config"]
    user = image["User"]
    print(f"user {user}, entry point {image['Entrypoint']} {image['Cmd']}, volumes {sorted(image['Volumes'])}")
    print(f"{size(root) / 1e6:.0f} MB unpacked")
    uid, gid = (int(part) for part in user.split(":"))
    someone = random.randrange(1_000_000_000, 2_000_000_000)
    failures = 0
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        scratch.chmod(0o755)
        for name, uid, gid, writable in [
            ("its own user, new volumes", uid, gid, True),
            ("a random user of group 0, new volumes", someone, 0, True),
            ("a random user of a random group, nothing writable", someone, someone, False),
        ]:
            print(f"\n{name} ({uid}:{gid})")
            try:
                picture = run(root, image, scratch, uid, gid, writable)
                (folder / "picture.png").write_bytes(picture)
                print("ok")
            except (AssertionError, OSError, subprocess.SubprocessError) as problem:
                failures += 1
                print(f"FAILED: {problem}")
    print(f"\nthe picture: {folder / 'picture.png'}\n{3 - failures} passed, {failures} failed")
    sys.exit(failures > 0)


def run(root, image, scratch, uid, gid, writable):
    """One container's life; its picture."""
    port = free_port()
    bundle = pathlib.Path(tempfile.mkdtemp(dir=scratch))
    specification = bundle_of(root, image, bundle, uid, gid, port, writable)
    (bundle / "config.json").write_text(json.dumps(specification))
    log = bundle / "log"
    name = f"understudy-{os.getpid()}-{port}"
    with open(log, "wb") as output:
        process = subprocess.Popen(crun(bundle, "run", "--bundle", str(bundle), name), stdout=output, stderr=output)
        try:
            wait_until_ready(process, port, log)
            see_process(bundle, name, uid, gid)
            # The Dockerfile's HEALTHCHECK, which an OCI image's configuration has no field for.
            told = subprocess.run(crun(bundle, "exec", name, *image["Entrypoint"], "health"), capture_output=True, timeout=30)
            assert told.returncode == 0, f"health: {told.stdout + told.stderr}"
            print(f"  health: {(told.stdout + told.stderr).decode().strip() or 'ended with 0'}")
            body = json.dumps({"prompt": "ankle boot", "seed": 1, "num_inference_steps": 10})
            status, type, picture = ask(port, "POST", "/v1/images/generations", body, "image/png")
            assert status == 200 and picture.startswith(b"\x89PNG"), f"{status} {picture[:200]}"
            print(f"  POST /v1/images/generations: {status}, {type}, {len(picture)} bytes")
            arms = [{"model": f"fashion-mnist-{role}", "weight": 1} for role in ("teacher", "student")]
            experiment = json.dumps({"id": "first", "arms": arms})
            status, _, answer = ask(port, "POST", "/v1/experiments", experiment, "application/json")
            print(f"  POST /v1/experiments: {status} {answer.decode()[:160]}")
            kept = bundle / "volumes/var/lib/understudy"
            if writable:
                assert status in (200, 201), "an experiment could not be begun"
                made = [f"{path.name} ({path.stat().st_uid}, {stat.filemode(path.stat().st_mode)})" for path in kept.iterdir()]
                print(f"  kept: {', '.join(made)}")
            else:
                assert status == 503 and b"/var/lib/understudy" in answer, "it is told that none can be kept, and where"
                assert b"cannot be kept" in log.read_bytes(), "the log has the reason"
        finally:
            # It was asked for its health every moment.
            said = [line for line in log.read_text(errors="replace").splitlines() if 'path="/health"' not in line]
            print("  | " + "\n  | ".join(said))
            begun = time.monotonic()
            subprocess.run(crun(bundle, "kill", name, "TERM"), capture_output=True)
            try:
                ended = process.wait(30)
            except subprocess.TimeoutExpired:
                subprocess.run(crun(bundle, "kill", name, "KILL"), capture_output=True)
                ended = process.wait(30)
    print(f"  SIGTERM: ended with {ended} after {time.monotonic() - begun:.1f} s")
    assert ended == 0, "a stop ends it with 0"
    return picture


def bundle_of(root, image, bundle, uid, gid, port, writable):
    """The runtime specification of a container: what `docker run --read-only --cap-drop ALL --user` asks for."""
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]},
    ]
    for volume in image["Volumes"] if writable else []:
        # A new volume begins as the image has the folder, with its owner and mode.
        folder, model = bundle / "volumes" / volume.lstrip("/"), (root / volume.lstrip("/")).stat()
        folder.mkdir(parents=True)
        os.chown(folder, model.st_uid, model.st_gid)
        folder.chmod(stat.S_IMODE(model.st_mode))
        mounts.append({"destination": volume, "type": "bind", "source": str(folder), "options": ["bind", "rw"]})
    return {
        "ociVersion": "1.0.2",
        "root": {"path": str(root), "readonly": True},
        "process": {
            "user": {"uid": uid, "gid": gid},
            "args": [*image["Entrypoint"], *image["Cmd"]],
            "env": [*image["Env"], f"UNDERSTUDY_PORT={port}"],
            "cwd": image["WorkingDir"],
            "capabilities": NOTHING,
            "noNewPrivileges": True,
        },
        "mounts": mounts,
        # No network of its own: it is asked over this machine's loopback.
        "linux": {"namespaces": [{"type": kind} for kind in NAMESPACES]},
    }


def crun(bundle, *arguments):
    """crun wants one tree of control groups, and many machines have the old ones beside it: it gets its own view."""
    view = "mount -t tmpfs none /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && exec \"$@\""
    options = ["--root", str(bundle / "crun"), "--cgroup-manager=disabled"]
    return ["unshare", "--mount", "sh", "-c", view, "sh", "crun", *options, *arguments]


def wait_until_ready(process, port, log):
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, f"it ended with {process.returncode}: {log.read_text(errors='replace')}"
        try:
            if ask(port, "GET", "/health", None, "*/*")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"not ready after {START_SECONDS} s: {log.read_text(errors='replace')}")


def see_process(bundle, name, uid, gid):
    """What the kernel says of it, not what was asked for."""
    state = json.loads(subprocess.run(crun(bundle, "state", name), capture_output=True, check=True).stdout)
    process = pathlib.Path("/proc") / str(state["pid"])
    said = dict(line.split(":\t", 1) for line in (process / "status").read_text().splitlines() if ":\t" in line)
    assert said["Uid"].split() == [str(uid)] * 4 and said["Gid"].split() == [str(gid)] * 4, said
    assert all(int(said[f"Cap{set}"], 16) == 0 for set in ("Inh", "Prm", "Eff", "Bnd", "Amb")), said
    assert said["NoNewPrivs"] == "1", said
    root = [line.split() for line in (process / "mountinfo").read_text().splitlines() if line.split()[4] == "/"]
    assert "ro" in root[-1][5].split(","), root
    print(f"  pid 1 inside, user {uid}:{gid}, no capabilities, no new privileges, read-only root")


def ask(port, method, path, body, accept):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Accept": accept} | ({"Content-Type": "application/json"} if body else {})
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    return reply.status, reply.headers.get("Content-Type"), reply.read()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def size(root):
    return sum(path.lstat().st_size for path in root.rglob("*") if path.is_file() and not path.is_symlink())


if __name__ == "__main__":
    main()
