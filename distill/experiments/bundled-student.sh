#!/usr/bin/env bash
# Makes students like the two bundled ones, from the bundled teacher, without data.
#
#     distill/experiments/bundled-student.sh FOLDER
#
# FOLDER/fashion-mnist-student has half the teacher's cost (20,000 steps), FOLDER/fashion-mnist-student-4 goes on from it and needs
# 4 evaluations an image (6,000 steps). Each run says first how long it will take. Interrupted, the same command goes on where it
# was.
#
# The bundled student did not begin with the teacher's channels but with the weights of an earlier one, which had learned for
# 47,000 steps from an earlier teacher, and took 6,000 steps with --rho 0.04. The rest is as here, in one thread.
#
# Takes `understudy` from the PATH, else what `cargo build --release` made here.
set -euo pipefail
out=${1:?"name the folder to make the models in, such as my-models"}
root=$(cd "$(dirname "$0")/../.." && pwd)
command -v understudy >/dev/null || PATH=$root/target/release:$PATH

distil() {
    understudy distill --teacher fashion-mnist-teacher --batch 32 --learning-rate 1e-3 --sample-every 0 --no-report --seed 0 "$@"
}
distil --student "$root/configs/fashion-mnist-unet.json" --init pruned --steps 20000 --out "$out/fashion-mnist-student"
distil --student "$out/fashion-mnist-student" --evaluations 4 --steps 6000 --rho 0.02 --out "$out/fashion-mnist-student-4"
