#!/usr/bin/env bash
# Makes the bundled student again: models/zoo/fashion-mnist-student, from the bundled teacher, without data.
#
#     distill/experiments/bundled-student.sh FOLDER
#
# Three runs, each beginning with the weights of the one before: FOLDER/first (5,000 steps), FOLDER/second (6,000) and
# FOLDER/fashion-mnist-student (36,000). On two idle cores they take under three hours together. Interrupted, the same
# command goes on where it was. The bundled one was made with one thread a run; images of another build or machine differ
# in their last bits, and its scores in the third digit.
#
# Takes `understudy` from the PATH, else what `cargo build --release` made here.
set -euo pipefail
out=${1:?"name the folder to make the models in, such as my-models"}
root=$(cd "$(dirname "$0")/../.." && pwd)
command -v understudy >/dev/null || PATH=$root/target/release:$PATH

# The teacher was evaluated in bf16, where the processor multiplies it.
dtype=f32
grep -qw avx512_bf16 /proc/cpuinfo 2>/dev/null && dtype=bf16

distil() {
    understudy distill --teacher fashion-mnist-teacher --weighting velocity --batch 32 --warmup-steps 100 \
        --learning-rate-schedule cosine --walk-steps 50 --dtype "$dtype" --sample-every 0 --no-report "$@"
}
distil --student "$root/configs/fashion-mnist-unet.json" --init pruned --prediction v_prediction \
    --steps 5000 --learning-rate 1e-3 --rho 0.1 --seed 0 --out "$out/first"
distil --student "$out/first" \
    --steps 6000 --learning-rate 5e-4 --rho 0.05 --seed 7 --out "$out/second"
distil --student "$out/second" \
    --steps 36000 --learning-rate 1e-3 --rho 0.1 --seed 11 --out "$out/fashion-mnist-student"
