#!/usr/bin/env bash
# The first hour of a new user, in a fresh clone: tests/first_hour/run.sh [FOLDER-FOR-SCREENSHOTS]
#
# Builds, serves the bundled pair, asks it with curl, opens its page while models load, distils a quick student, reads the
# report, serves the student beside its teacher, evaluates it, and samples it in diffusers. Every output is checked. After
# the build this takes under 15 minutes on two cores.
#
# Needs bash, curl, git, Node, npm and Chromium (CHROMIUM names another than Debian's). PYTHON is a Python with torch and
# diffusers; without these, the last part is left out, and says so. CARGO_TARGET_DIR is taken as cargo takes it.
# UNDERSTUDY_BINARY tries a program that is built already.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
scratch=$(mktemp -d)
shots=${1:-$scratch/screenshots}
mkdir -p "$shots"
shots=$(cd "$shots" && pwd)
server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null || :' EXIT

part() { printf '\n== %4d s  %s\n' $((SECONDS - began)) "$1"; }
fail() { echo "FAILED: $1" >&2; exit 1; }
# Standard input has every one of the words.
says() {
    local said
    said=$(cat)
    for words in "$@"; do
        [[ $said == *"$words"* ]] || fail "it does not say \"$words\": $said"
    done
}
# The server that a command starts, on a free port; `base` is its address once its models are ready.
start() {
    "$@" --port 0 --data-dir "$scratch/data" >"$scratch/served" 2>"$scratch/server.log" &
    server=$!
    until base=$(grep -o 'http://[0-9.]*:[0-9]*' "$scratch/served" | head -n 1) && [ -n "$base" ]; do
        kill -0 "$server" || fail "the server ended: $(cat "$scratch/server.log")"
        sleep 0.1
    done
    curl -sS --fail --retry 60 --retry-delay 1 --retry-all-errors --max-time 90 -o /dev/null "$base/health" 2>/dev/null ||
        fail "$base/health does not become 200"
}
stop() {
    kill -INT "$server"
    wait "$server" || fail "the server ended with $?"
    server=
}

began=$SECONDS
part "a fresh clone of $(git -C "$root" log -1 --format=%h), in $scratch"
[ -z "$(git -C "$root" status --porcelain)" ] || echo "What is not committed is not in it."
git clone --quiet "$root" "$scratch/understudy"
cd "$scratch/understudy"
export XDG_CACHE_HOME=$scratch/cache XDG_STATE_HOME=$scratch/state
if [ -n "${UNDERSTUDY_BINARY:-}" ]; then
    mkdir "$scratch/bin"
    cp "$UNDERSTUDY_BINARY" "$scratch/bin/understudy"
    export PATH=$scratch/bin:$PATH
else
    cargo build --release --locked
    export PATH=${CARGO_TARGET_DIR:-$PWD/target}/release:$PATH
fi
npm ci --prefix tests/browser --no-audit --no-fund --silent
program=$(command -v understudy)
built=$((SECONDS - began))
began=$SECONDS

part "the page, opened while models are on their way"
node tests/browser/first_hour.js bundled "$program" "$shots"

part "the bundled pair, asked with curl"
start understudy serve
understudy models | says fashion-mnist-teacher "student of fashion-mnist-teacher"
curl -s "$base/v1/images/generations" -H 'Content-Type: application/json' \
    -H 'Accept: image/png' -d '{"seed": 1}' -o image.png
[ "$(head -c 4 image.png | tail -c 3)" = PNG ] || fail "image.png is no PNG"
curl -s "$base/v1/compare" -H 'Content-Type: application/json' -d '{"seed": 1}' | says '"speedup"' '"psnr_db"' '"shared_noise":true'
stop

part "a quick student"
understudy distill --teacher fashion-mnist-teacher --out my-models/student --preset quick 2>"$scratch/distil.log" | tee "$scratch/distilled"
says "Filling the sample pool" "1,500 steps of" "In all" "of memory" "on disk" <"$scratch/distil.log"
says "Student saved to my-models/student" "Report: my-models/student/report/index.html" <"$scratch/distilled"

part "its report"
says "The same seeds" "Where they differ most" "Loss" "What to do next" <my-models/student/report/index.html
node tests/browser/first_hour.js report my-models/student/report/index.html "$shots"

part "the student beside its teacher, by the line that distill ended with"
line=$(grep -o 'understudy serve .*' "$scratch/distilled")
says "understudy serve --models my-models" <<<"$line"
read -ra command <<<"$line"
start "${command[@]}"
curl -s "$base/v1/compare" -H 'Content-Type: application/json' -d '{"seed": 1}' | says '"model":"fashion-mnist-teacher"' '"model":"student"'
stop
node tests/browser/first_hour.js student "$program" "$shots"

part "is it good?"
understudy evaluate --model my-models/student --against fashion-mnist-teacher 2>/dev/null | tee "$scratch/evaluated"
says "Precision" "Recall" "images of each model" "The scores are in my-models/student/understudy.json" <"$scratch/evaluated"
grep -qE '^(Use it|Usable|Not yet)' "$scratch/evaluated" || fail "no verdict"
says '"precision"' '"recall"' <my-models/student/understudy.json
understudy report my-models/student --n 640 2>/dev/null | says "Report: my-models/student/report/index.html"

part "the model cards' Python, in diffusers"
python=${PYTHON:-python3}
if "$python" -c "import torch, diffusers" 2>/dev/null; then
    for model in models/zoo/fashion-mnist-{teacher,student} models/zoo/emoji-text-to-image-student-4 my-models/student; do
        "$python" tests/first_hour/card.py "$model" "$shots/diffusers-$(basename "$model").png" 2>/dev/null
    done
else
    echo "Left out: $python has no torch and diffusers; PYTHON names another."
fi

took=$((SECONDS - began))
printf '\nAll of it held: %d min %02d s to build, %d min %02d s after it. Screenshots are in %s\n' \
    $((built / 60)) $((built % 60)) $((took / 60)) $((took % 60)) "$shots"
