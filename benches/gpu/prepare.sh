#!/usr/bin/env bash
# Builds understudy for NVIDIA GPUs on a machine that has neither a GPU nor the CUDA toolkit, and packs it with
# all that run.sh needs into one folder: what is left to do on the GPU is to measure.
#
#   CIFAR10_JPEG=DIR FASHION_MNIST=DIR benches/gpu/prepare.sh BUNDLE
#
# CIFAR10_JPEG   folder with *train*.tar.zst and *test*.tar.zst of class/NUMBER.jpg
# FASHION_MNIST  folder with the official idx files
# CAPABILITY     compute capability the kernels are compiled for [90: H100, H200]
# WORK           where the toolkit is unpacked and stays [target/gpu]
# BINARY         an understudy built already, instead of building one
# TESTS          whether to build the tests that need a GPU as well, and run them [no]
#
# Without a data folder its phases are left out there. Needs Python with pip, a C and a C++ compiler, xz, zstd and the
# package registries; 12 minutes of two cores for the build.
#
# The binary is tried out on a GPU in software; so is a whole phase, where Python has PyTorch and diffusers, by
#
#   UNDERSTUDY=WORK/emulated/understudy BUNDLE/run.sh check --tiny
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
bundle=${1:?the folder to make}
work=${WORK:-$root/target/gpu}
limit_mib=50
mkdir -p "$work" "$bundle"
bundle=$(cd "$bundle" && pwd)

# The compiler, its headers, and the libraries to link with: CUDA 13.0.
environment() {
    local site nvidia
    [ -x "$work/cuda/bin/pip" ] || python3 -m venv "$work/cuda"
    "$work/cuda/bin/pip" install --quiet --no-compile \
        "nvidia-cuda-nvcc==13.0.88" "nvidia-cuda-runtime==13.0.96" "nvidia-cuda-nvrtc<13.1" \
        "nvidia-nvvm<13.1" "nvidia-cuda-crt<13.1" "nvidia-cuda-cccl<13.1" "nvidia-curand<10.4.1" \
        "nvidia-cublas<13.2" nvidia-cudnn-cu13
    site=$("$work/cuda/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    nvidia=$site/nvidia
    export CUDA_HOME=$nvidia/cu13 CUDA_PATH=$nvidia/cu13 CUDA_ROOT=$nvidia/cu13 CUDA_TOOLKIT_ROOT_DIR=$nvidia/cu13
    export CUDA_COMPUTE_CAP=${CAPABILITY:-90} PATH=$nvidia/cu13/bin:$PATH
    # The linker looks for bare names. The driver's library is on the GPU machine alone: an empty one of its
    # name stands in, its symbols are found when the program runs.
    links=$work/links
    mkdir -p "$links"
    for name in cublas cublasLt cudart curand nvrtc; do
        ln -sf "$nvidia/cu13/lib/lib$name.so".[0-9]* "$links/lib$name.so"
    done
    ln -sf "$nvidia/cudnn/lib/libcudnn.so.9" "$links/libcudnn.so"
    echo | cc -shared -x c -Wl,-soname,libcuda.so.1 -o "$links/libcuda.so" -
}

# Do the kernels that are compiled at run time compile, and can they be assembled?
kernels() {
    local ours=$root/models/src
    for sources in numbers,functions,layers numbers,functions,gradients numbers,attention numbers,lists ../../sampler/advance/kernel; do
        (cd "$ours/gpu/kernels"; IFS=,; for name in $sources; do cat "$name.cu"; done) >"$work/kernel.cu"
        nvcc --cubin -arch="sm_${CAPABILITY:-90}" "$work/kernel.cu" -o "$work/kernel.cubin"
    done
}

linked() {
    cargo rustc --locked --features cuda "$@" -- \
        -L "native=$links" -C "link-arg=-Wl,--unresolved-symbols=ignore-all,-z,lazy" \
        -C "link-arg=-Wl,--no-as-needed" -C link-arg=-lcuda -C strip=symbols
}

build() {
    (cd "$root" && linked --release --bin understudy)
    binary=${CARGO_TARGET_DIR:-$root/target}/release/understudy
}

# Each kernel against plain loops, and U-Nets of every kind against diffusers and f64, on the GPU in software.
tests() {
    local told='import json, sys; print([said["executable"] for said in map(json.loads, sys.stdin) if said.get("executable")][-1])'
    for target in --lib --test=unet; do
        binary_of_tests=$(cd "$root/models" && linked "$target" --profile test --message-format json | python3 -c "$told")
        "$root/tools/cuda-emulator/build.sh" "$work/emulated-tests" "$binary_of_tests"
        "$work/emulated-tests/understudy" --ignored
    done
}

# Does it run? On a GPU in software, and on the CPU where the driver knows no GPU.
start() {
    "$root/tools/cuda-emulator/build.sh" "$work/emulated" "$binary"
    for gpus in 1 0; do
        EMULATED_GPUS=$gpus UNDERSTUDY_MODELS="$root/models/zoo" "$work/emulated/understudy" \
            sample --model fashion-mnist-student --n 1 --steps 3 --out "$work/start-$gpus.png"
    done
}

environment
kernels
if [ "${CHECK_ONLY:-}" ]; then
    cd "$root"
    cargo check --locked --features cuda
    # Code that only several GPUs need; NCCL itself is not asked for by a check.
    if command -v mpicc >/dev/null; then exec cargo check --locked --features nccl; fi
    echo "no mpicc here: the code for several GPUs is not compiled"
    exit
fi
if [ "${BINARY:-}" ]; then binary=$BINARY; else build; fi
start
if [ "${TESTS:-}" ]; then tests; fi

echo "packing $bundle"
xz --threads=0 -6 --stdout "$binary" >"$bundle/understudy.xz"
cp "$root"/benches/gpu/*.py "$root/benches/gpu/run.sh" "$root/benches/peers/networks.py" "$bundle/"
mkdir -p "$bundle/models" "$bundle/data" "$bundle/wheels"
cp -r "$root"/models/zoo/*/ "$bundle/models/"
if [ "${CIFAR10_JPEG:-}" ]; then
    for part in train test; do
        # Plain tar: Python reads it, and JPEGs do not shrink.
        zstd -dcq --long=27 "$CIFAR10_JPEG"/*$part*.tar.zst >"$work/cifar10-jpeg-$part.tar"
        xz --threads=0 -6 --stdout "$work/cifar10-jpeg-$part.tar" >"$bundle/data/cifar10-jpeg-$part.tar.xz"
    done
fi
if [ "${FASHION_MNIST:-}" ]; then
    cp "$FASHION_MNIST"/t10k-*-ubyte.gz "$bundle/data/"
fi
# diffusers, and what of its needs a PyTorch image may lack.
"$work/cuda/bin/pip" download --quiet --no-deps --only-binary=:all: --dest "$bundle/wheels" \
    diffusers==0.39.0 importlib_metadata zipp httpx httpcore h11 anyio idna certifi sniffio
{
    echo "commit $(git -C "$root" rev-parse HEAD 2>/dev/null || echo unknown)"
    echo "capability ${CAPABILITY:-90}"
    (cd "$bundle" && sha256sum understudy.xz)
} >"$bundle/ABOUT"
size=$(du -sm "$bundle" | cut -f1)
echo "$bundle: $size MiB"
if [ "$size" -ge "$limit_mib" ]; then
    echo "more than $limit_mib MiB; leave out a data folder" >&2
    exit 1
fi
