#!/usr/bin/env bash
# Runs a phase on a machine with an NVIDIA GPU, from the folder that prepare.sh made, without network.
#
#   ./run.sh check|bench|train|distil [OPTIONS]       each ends within 9 minutes; --help tells its options
#
# OUT      where results go, as they come [results, beside this script]
# WORK     where things are unpacked [/tmp/understudy-gpu]
# PYTHON   an interpreter that has PyTorch [python3]
# LIMIT    seconds after which a phase is stopped [530]
#
# Needs a driver, PyTorch and CUDA's libraries (those that came with PyTorch will do).
set -euo pipefail
bundle=$(cd "$(dirname "$0")" && pwd)
phase=${1:?check, bench, train or distil}
shift
case $phase in check | bench | train | distil) ;; *) echo "no phase $phase" >&2; exit 2 ;; esac
export OUT=${OUT:-$bundle/results} WORK=${WORK:-/tmp/understudy-gpu}
python=${PYTHON:-python3}
mkdir -p "$OUT" "$WORK"

if [ -z "${UNDERSTUDY:-}" ]; then
    UNDERSTUDY=$WORK/understudy
    if [ ! -x "$UNDERSTUDY" ]; then
        "$python" -c 'import lzma, shutil, sys
with lzma.open(sys.argv[1]) as packed, open(sys.argv[2], "wb") as plain: shutil.copyfileobj(packed, plain)' \
            "$bundle/understudy.xz" "$UNDERSTUDY.part"
        chmod +x "$UNDERSTUDY.part" && mv "$UNDERSTUDY.part" "$UNDERSTUDY"
    fi
fi
export UNDERSTUDY
if ! "$python" -c 'import diffusers' 2>/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$WORK/site" "$bundle"/wheels/*.whl
    export PYTHONPATH="$WORK/site${PYTHONPATH:+:$PYTHONPATH}"
fi
# CUDA's libraries, those of PyTorch's wheels before others, as prepare.sh links with the same major version.
libraries=$("$python" -c 'import importlib.util as u, pathlib
spec = u.find_spec("nvidia")
places = list(spec.submodule_search_locations) if spec else []
print(":".join(str(p) for q in places for p in sorted(pathlib.Path(q).glob("*/lib"))))')
export LD_LIBRARY_PATH="${libraries}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export BUNDLE=$bundle PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 DIFFUSERS_VERBOSITY=error
exec timeout --signal=INT --kill-after=10 "${LIMIT:-530}" "$python" "$bundle/$phase.py" "$@"
