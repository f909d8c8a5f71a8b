"""Makes hub.json: where the real `huggingface_hub` looks, by environment. `pip install huggingface_hub` first.

    python make_hub.py            writes the table
    python make_hub.py BINARY     besides, one cache for both: what `BINARY sample` fetched from a local Hub is found
                                  by Python without a network, and the other way round
"""

import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading

HERE = pathlib.Path(__file__).parent
HOME = {"HOME": "/home/somebody"}
CASES = [
    {},
    {"HF_HOME": "/models/hf"},
    {"HF_HOME": "/models/hf/"},
    {"HF_HOME": "relative"},
    {"HF_HOME": "~/hf"},
    {"HF_HOME": "~"},
    {"HF_HOME": "~root/hf"},
    {"HF_HOME": "~nobody-of-that-name/../hf", "HF_HUB_CACHE": "/c"},
    {"HF_HOME": "a~b"},
    {"HF_HOME": "$BASE/hf", "BASE": "/base"},
    {"HF_HOME": "${BASE}hf$", "BASE": "/base"},
    {"HF_HOME": "$UNSET/${UNSET}/hf"},
    {"HF_HOME": "$BASE/hf", "BASE": "$OTHER", "OTHER": "/other"},
    {"HF_HOME": "/x/${BASE"},
    {"HF_HOME": "~/hf", "HOME": "/"},
    {"XDG_CACHE_HOME": "/xdg"},
    {"XDG_CACHE_HOME": "~/xdg"},
    {"XDG_CACHE_HOME": "/xdg", "HF_HOME": "/hf"},
    {"HF_HUB_CACHE": "/cache"},
    {"HF_HUB_CACHE": "~/cache/$BASE", "BASE": "b"},
    {"HUGGINGFACE_HUB_CACHE": "/legacy"},
    {"HUGGINGFACE_HUB_CACHE": "~/legacy"},
    {"HUGGINGFACE_HUB_CACHE": "/legacy", "HF_HUB_CACHE": "/cache"},
    {"HUGGINGFACE_HUB_CACHE": "/legacy", "HF_HOME": "/hf"},
    {"HF_TOKEN_PATH": "~/secret"},
    {"HF_TOKEN_PATH": "$BASE/secret", "BASE": "/base", "HF_HOME": "/hf"},
    {"HF_TOKEN": " hf_abc\n"},
    {"HF_TOKEN": "\n"},
    {"HUGGING_FACE_HUB_TOKEN": "hf_old"},
    {"HF_TOKEN": "hf_new", "HUGGING_FACE_HUB_TOKEN": "hf_old"},
    {"HF_TOKEN": "hf_new", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"},
    {"HF_ENDPOINT": "https://hub.example/"},
    *({"HF_HUB_OFFLINE": value} for value in ["1", "on", "Yes", "TRUE", "0", "false", "2", ""]),
    {"TRANSFORMERS_OFFLINE": "1"},
    {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "1"},
]
ASK = """
import json
from huggingface_hub import constants
from huggingface_hub.utils import build_hf_headers
sent = build_hf_headers().get("authorization")
print(json.dumps({
    "cache": constants.HF_HUB_CACHE,
    "token_path": constants.HF_TOKEN_PATH,
    "offline": constants.HF_HUB_OFFLINE,
    "endpoint": constants.ENDPOINT,
    "token": sent and sent.removeprefix("Bearer "),
}))
"""


def python(code, environment, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def table():
    import huggingface_hub

    cases = []
    for case in CASES:
        environment = HOME | case
        cases.append({"environment": environment} | json.loads(python(ASK, environment)))
    made = {"huggingface_hub": huggingface_hub.__version__, "cases": cases}
    (HERE / "hub.json").write_text(json.dumps(made, indent=1) + "\n")
    print(f"{len(cases)} cases")


SHA = "0123456789abcdef0123456789abcdef01234567"
ID = "somebody/clothes"
TEACHER = HERE.parent.parent / "zoo" / "fashion-mnist-teacher"


def hub():
    """A Hub of one repository."""
    files = {str(path.relative_to(TEACHER)): path.read_bytes() for path in TEACHER.rglob("*") if path.is_file()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(False)

        def do_GET(self):
            self.answer(True)

        def answer(self, body):
            path = self.path.split("?")[0]
            headers = {}
            status, content = 404, b""
            if path.startswith(f"/api/models/{ID}"):
                siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
                tree = [{"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for n, d in files.items()]
                listing = {"id": ID, "modelId": ID, "sha": SHA, "siblings": siblings, "tags": [], "private": False}
                status, content = 200, json.dumps(tree if "/tree/" in path else listing).encode()
                headers["Content-Type"] = "application/json"
            elif (name := path.removeprefix(f"/{ID}/resolve/{SHA}/").removeprefix(f"/{ID}/resolve/main/")) in files:
                status, content = 200, files[name]
                headers |= {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": SHA}
                if (wanted := self.headers.get("Range", "")).startswith("bytes="):
                    start, end = wanted.removeprefix("bytes=").split("-")
                    start, end = int(start), min(int(end or len(content) - 1), len(content) - 1)
                    headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
                    status, content = 206, content[start:end + 1]
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


SNAPSHOT = "import sys; from huggingface_hub import snapshot_download; print(snapshot_download(sys.argv[1]))"


def one_cache(binary):
    """Both directions, each with a network first and then without."""
    for first, second in [("binary", "python"), ("python", "binary")]:
        with tempfile.TemporaryDirectory() as folder:
            environment = HOME | {"HF_HUB_CACHE": f"{folder}/cache", "HF_ENDPOINT": hub(), "HF_HUB_DISABLE_XET": "1"}
            environment |= {"PATH": os.environ["PATH"], "XDG_CACHE_HOME": folder}

            def use(who, environment):
                if who == "python":
                    return python(SNAPSHOT, environment, ID)
                out = f"{folder}/{who}.png"
                command = [binary, "sample", "--model", ID, "--n", "1", "--steps", "1", "--out", out]
                subprocess.run(command, env=environment, check=True)

            use(first, environment)
            use(second, environment | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"})
            print(f"{second} reads what {first} fetched")


if __name__ == "__main__":
    table()
    if len(sys.argv) > 1:
        one_cache(sys.argv[1])
