#!/usr/bin/env bash
# Distils over ranks with a real MPI, and holds it to its promises: the same bytes by 1, 2 and 4 processes, resumed by others, after
# a kill, at the speed and with the traffic of the formula. tests/ranks/run.sh [PROGRAM], one with the feature mpi; without, it is built.
# It needs Open MPI and libclang (Debian: apt-get install libopenmpi-dev openmpi-bin libclang-dev) and two processors.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

for program in mpicc mpirun; do
    if ! command -v "$program" >/dev/null; then
        echo "tests/ranks/run.sh: no $program here; install Open MPI (Debian: apt-get install libopenmpi-dev openmpi-bin libclang-dev)" >&2
        exit 1
    fi
done
understudy=${1:-target/release/understudy}
if [ $# = 0 ]; then cargo build --release --locked --features mpi; fi

home=$(mktemp -d)
trap 'rm -rf "$home"' EXIT
launch=(mpirun --oversubscribe --bind-to none)
# Open MPI refuses root unless it insists.
if [ "$(id -u)" = 0 ]; then launch+=(--allow-run-as-root); fi

fail() { echo "FAILED: $*" >&2; exit 1; }
# distil OUT STEPS SHARDS BATCH [CHECKPOINT_EVERY]: the words of a run.
distil() {
    echo "$understudy" distill --teacher fashion-mnist-teacher --student configs/fashion-mnist-unet.json --init random --out "$home/$1" \
        --steps "$2" --shards "$3" --batch "$4" --rho 0.002 --warmup-steps 5 --learning-rate-schedule constant --checkpoint-every "${5:-4}" \
        --sample-every 0 --threads 1 --no-report
}
# ranks N OUT STEPS SHARDS BATCH
ranks() {
    local count=$1
    shift
    # shellcheck disable=SC2046 # words
    "${launch[@]}" -n "$count" $(distil "$@") >"$home/told" 2>&1 || { cat "$home/told" >&2; fail "mpirun -n $count"; }
}
weights() { echo "$home/$1/unet/diffusion_pytorch_model.safetensors"; }
# The tensors of a checkpoint: all but its header, which tells the time that the run took.
tensors() {
    local file=$home/$1/training/checkpoint.safetensors header
    header=$(od -An -tu8 -N8 "$file")
    tail -c "+$((header + 9))" "$file"
}
same() {
    cmp "$(weights "$1")" "$(weights "$2")" || fail "$1 and $2 are different students"
    cmp <(tensors "$1") <(tensors "$2") || fail "$1 and $2 have different checkpoints"
}

echo "== The same student by one process without MPI, and by 1, 2 and 4 ranks"
# shellcheck disable=SC2046 # words
$(distil alone 12 4 16) >"$home/told" 2>&1 || { cat "$home/told" >&2; fail "without mpirun"; }
for count in 1 2 4; do
    ranks $count "ranks-$count" 12 4 16
    same alone "ranks-$count"
done
sha256sum "$(weights alone)" | cut -c1-64

echo "== 4 ranks, then 2, then 1"
ranks 4 resumed 4 4 16
ranks 2 resumed 8 4 16
ranks 1 resumed 12 4 16
same alone resumed

echo "== A rank is killed: all end, and the run goes on"
for victim in 0 1; do
    out=killed-$victim
    # shellcheck disable=SC2046 # words
    "${launch[@]}" -n 2 $(distil "$out" 100000 4 16) >"$home/told" 2>&1 &
    launcher=$!
    until [ "$(wc -l 2>/dev/null <"$home/$out/training/log.jsonl" || echo 0)" -ge 6 ]; do
        kill -0 $launcher || { cat "$home/told" >&2; fail "the run ended by itself"; }
        sleep 0.05
    done
    processes=$(pgrep -P $launcher -f distill)
    for process in $processes; do
        if tr '\0' '\n' <"/proc/$process/environ" | grep -qx "OMPI_COMM_WORLD_RANK=$victim"; then kill -KILL "$process"; fi
    done
    began=$(date +%s.%N)
    if wait $launcher; then fail "mpirun ended well without rank $victim"; fi
    # mpirun kills, and does not wait until the system is done with it.
    for process in $processes; do timeout 10 tail --pid="$process" -s 0.05 -f /dev/null || fail "process $process lives on"; done
    awk -v began="$began" -v ended="$(date +%s.%N)" -v rank=$victim \
        'BEGIN { printf "rank %d killed, all ended after %.1f s\n", rank, ended - began; exit ended - began > 10 }' || fail "it took too long"
    # Back to the last checkpoint and on, by another number of ranks.
    ranks 4 "$out" 12 4 16
    same alone "$out"
done

echo "== A rank that fails ends all"
# shellcheck disable=SC2046 # words
if timeout 60 "${launch[@]}" -n 2 $(distil wrong 12 4 16) : -n 1 $(distil wrong 12 4 32) : -n 1 $(distil wrong 12 4 16) >"$home/told" 2>&1; then
    fail "ranks with different arguments went on"
fi
# shellcheck disable=SC2016 # no commands
grep -F 'of the first rank `batch` is 16, of this one 32' "$home/told" || { cat "$home/told" >&2; fail "not told why"; }
[ ! -e "$home/wrong/training/checkpoint.safetensors" ] || fail "there is a checkpoint"

echo "== Bytes that a rank sends in a step, beside 2·(N − 1)/N of the gradient's"
# 4·P: the file but for its header.
gradient=$(($(stat -c %s "$(weights alone)") - 8 - $(od -An -tu8 -N8 "$(weights alone)")))
# ring N BYTES WHAT
ring() {
    awk -v count="$1" -v sent="$2" -v what="$3" -v gradient="$gradient" 'BEGIN {
        formula = 2 * (count - 1) / count * gradient
        printf "%d ranks, %s: %d, %+.2f %% of %d\n", count, what, sent, 100 * (sent / formula - 1), formula
        exit sent < 0.99 * formula || sent > 1.01 * formula
    }' || fail "bytes of a step"
}
for count in 2 4; do
    ring $count "$(grep -o '"sent_bytes":[0-9]*' "$home/ranks-$count/training/log.jsonl" | tail -1 | cut -d: -f2)" "by the journal"
done
# In a network of its own the loopback device counts what MPI really sends. What is not a step's cancels between two runs.
own=(unshare --net)
if [ "$(id -u)" != 0 ]; then own+=(--map-root-user); fi
if "${own[@]}" true 2>/dev/null; then
    wire() {
        "${own[@]}" bash -c '
            ip link set lo up
            "$@" >"$0" 2>&1 || exit 1
            awk "\$1 == \"lo:\" { print \$10 }" /proc/net/dev' \
            "$home/told" "${launch[@]}" --mca btl self,tcp --mca btl_tcp_if_include lo -n "$1" $(distil "wire-$1-$2" "$2" 4 16) ||
            { cat "$home/told" >&2; fail "mpirun over TCP"; }
    }
    for count in 2 4; do
        short=$(wire $count 3)
        long=$(wire $count 27)
        ring $count $(((long - short) / 24 / count)) "on the wire"
    done
else
    echo "NOT MEASURED on the wire: unshare --net is not allowed here"
fi

# Without checkpoints in between: by default there is one in 1,000 steps.
echo "== Two ranks beside two unconnected runs, each of half the batch and bound to a processor of its own"
mapfile -t processors < <(taskset -cp $$ | sed 's/.*: //' | tr ',' '\n' | awk -F- '{ for (n = $1; n <= ($2 == "" ? $1 : $2); n++) print n }')
[ ${#processors[@]} -ge 2 ] || fail "needs two processors"
# rate OUT: steps a second, after the first few.
rate() {
    grep -o '"seconds":[0-9.]*' "$home/$1/training/log.jsonl" | cut -d: -f2 | tail -n +6 |
        awk 'NR == 1 { first = $1 } { last = $1 } END { print (NR - 1) / (last - first) }'
}
for round in {1..9}; do
    # shellcheck disable=SC2046 # words
    {
        taskset -c "${processors[0]}" $(distil "apart-$round-0" 60 1 32 1000) >"$home/told" 2>&1 &
        first=$!
        taskset -c "${processors[1]}" $(distil "apart-$round-1" 60 1 32 1000) >"$home/told-1" 2>&1 || fail "an unconnected run"
        wait $first || fail "an unconnected run"
        "${launch[@]}" -n 1 taskset -c "${processors[0]}" $(distil "together-$round" 60 2 64 1000) : \
            -n 1 taskset -c "${processors[1]}" $(distil "together-$round" 60 2 64 1000) >"$home/told" 2>&1 || fail "two ranks"
    }
    # Two unconnected runs do two steps of half the batch while two ranks do one of the whole.
    awk -v a="$(rate "apart-$round-0")" -v b="$(rate "apart-$round-1")" -v ranks="$(rate "together-$round")" \
        'BEGIN { printf "unconnected %.2f and %.2f steps/s, ranks %.2f: efficiency %.3f\n", a, b, ranks, 2 * ranks / (a + b) }' |
        tee -a "$home/efficiency"
done
sed 's/.* //' "$home/efficiency" | sort -n | sed -n 5p | awk '{ print "median", $1; exit $1 < 0.97 }' || fail "efficiency is below 0.97"
echo "All held."
