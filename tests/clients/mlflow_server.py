#!/usr/bin/env python3
"""A distillation told to a real MLflow tracking server.

    python3 -m venv V && V/bin/pip install mlflow && V/bin/python tests/clients/mlflow_server.py [BINARY]

Starts MLflow's own server on a free port, distils a student of the bundled teacher for a few steps with BINARY (by default the
newest of target/*/understudy), and reads with MLflow's own client what the server has of it: parameters, metrics, the end, the
report. Then the server is killed while another run goes on. Takes some minutes; exits with 0 only if all is well.
"""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import mlflow

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
STEPS = 120


def main():
    built = sorted(ROOT.glob("target/*/understudy"), key=lambda path: path.stat().st_mtime)
    program = pathlib.Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else built[-1]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        with server(folder) as (process, url):
            told(program, folder, url)
            killed(program, folder, url, process)
    print("all is well")


def distil(program, out, url, steps, *more):
    return [
        program, "distill", "--teacher=fashion-mnist-teacher", f"--student={ROOT}/configs/fashion-mnist-unet.json",
        "--init=random", f"--steps={steps}", "--batch=4", "--rho=0.002", "--sample-every=0", f"--out={out}",
        f"--mlflow={url}", "--mlflow-experiment=of a test", *more,
    ]


def told(program, folder, url):
    out = folder / "student"
    subprocess.run(distil(program, out, url, STEPS), check=True, cwd=ROOT)
    client = mlflow.MlflowClient(url)
    experiment = client.get_experiment_by_name("of a test")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "student", run.info
    assert run.info.end_time > run.info.start_time
    parameters = run.data.params
    expected = {"batch": "4", "method": "dkdm", "teacher": "fashion-mnist-teacher", "rho": "0.002", "seed": "0"}
    assert expected.items() <= parameters.items(), parameters
    log = [json.loads(line) for line in (out / "training/log.jsonl").read_text().splitlines()]
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert [point.step for point in losses] == [50, 100, STEPS], losses
    for point, begin in zip(losses, [0, 50, 100]):
        mean = sum(line["simple"] for line in log[begin:point.step]) / (point.step - begin)
        assert abs(point.value - mean) < 1e-6, (point, mean)
    assert run.data.metrics["learning_rate"] == log[-1]["learning_rate"]
    [artifact] = client.list_artifacts(run.info.run_id)
    page = pathlib.Path(client.download_artifacts(run.info.run_id, artifact.path, folder))
    assert artifact.path == "report.html" and page.read_bytes() == (out / "report/index.html").read_bytes()
    print(f"told: {len(parameters)} parameters, {sorted(run.data.metrics)}, {artifact.file_size} bytes of report")


def killed(program, folder, url, process):
    """A run whose server dies on the way ends as if it had had none."""
    out = folder / "other"
    run = subprocess.Popen(
        distil(program, out, url, 600, "--no-report"), cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )
    client = mlflow.MlflowClient(url)
    experiment = client.get_experiment_by_name("of a test").experiment_id
    while not any("loss" in other.data.metrics and other.info.run_name == "other" for other in client.search_runs([experiment])):
        assert run.poll() is None, "it ended before the server was killed"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    said = run.communicate()[1]
    assert run.returncode == 0 and (out / "model_index.json").exists(), said
    assert said.count(url) == 1 and "goes on without it" in said, said
    print("killed: the run went on")


@contextlib.contextmanager
def server(folder):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [
        sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1",
        f"--backend-store-uri=sqlite:///{folder}/mlflow.db", f"--artifacts-destination={folder}/artifacts",
    ]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/health", timeout=1)
                break
            assert process.poll() is None, (folder / "server.log").read_text()
            time.sleep(0.1)
        yield process, url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


if __name__ == "__main__":
    main()
