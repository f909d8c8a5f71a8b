#!/usr/bin/env bash
# Runs the tests of kernels and files under AddressSanitizer, and the portable kernels under Miri where it is installed:
# tests/campaign/memory.sh
#
# The sanitizer is a nightly option of rustc; RUSTC_BOOTSTRAP lets the pinned compiler take it. Miri needs a nightly
# toolchain (`rustup +nightly component add miri`).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

echo "AddressSanitizer: kernels, and the readers of files"
export CARGO_TARGET_DIR=target/asan
target=x86_64-unknown-linux-gnu
sanitized() {
    # A pool file is mapped for as long as the process lives: what is reachable at its end is no fault.
    RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address ASAN_OPTIONS=detect_leaks=0 cargo test --locked --target $target "$@"
}
sanitized -p understudy-models --lib -- kernels checkpoint
sanitized -p understudy-models --test state_dict --test folder --test adm
sanitized -p understudy-distill --lib -- data npz pool
sanitized -p understudy-distill --test pool

if cargo +nightly miri --version >/dev/null 2>&1; then
    echo "Miri: portable kernels"
    UNDERSTUDY_ISA=portable CARGO_TARGET_DIR=target/miri cargo +nightly miri test --locked -p understudy-models --lib -- kernels
else
    echo "no Miri here: the portable kernels are not run under it"
fi
