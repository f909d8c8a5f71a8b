#!/usr/bin/env bash
# Real clients against the server: openai, tritonclient, curl, promtool, schemathesis.
# Needs a Python with `pip install -r tests/clients/requirements.txt`, and promtool (Debian's prometheus).
# Usage: tests/clients/run.sh [HOST:PORT of a running server; without one a server is started]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'kill "${server:-}" 2>/dev/null || true; rm -rf "$work"' EXIT

host=${1:-}
if [[ -z $host ]]; then
    (cd "$here/../.." && cargo build --release)
    host=127.0.0.1:18080
    "$here/../../target/release/understudy" serve --port 18080 &
    server=$!
    curl -fsS --retry 60 --retry-delay 1 --retry-all-errors -o "$work/health" "http://$host/health"
fi

python3 "$here/clients.py" "$host"

curl -fsS "http://$host/v1/images/generations" -H 'Content-Type: application/json' \
    -H 'Accept: image/png' -d '{"seed": 1, "num_inference_steps": 2}' -o "$work/image.png"
[[ $(head -c 4 "$work/image.png" | tail -c 3) == PNG ]] && echo "curl: fine"

curl -fsS "http://$host/metrics" | promtool check metrics && echo "promtool: fine"

(cd "$work" && schemathesis --config-file "$here/schemathesis.toml" run "http://$host/openapi.json")
