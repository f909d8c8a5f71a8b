#!/usr/bin/env bash
# Builds a GPU in software: libraries that stand in for the driver, cuBLAS, cuDNN and cuRAND, with candle's kernels
# and this project's compiled for the CPU from their own sources.
#
#   CUDA_HOME=… tools/cuda-emulator/build.sh FOLDER BINARY     then FOLDER/understudy …, which is BINARY on that GPU
#
# BINARY   understudy built with `cuda`; functions it wants that are not emulated end the process when called
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
folder=${1:?the folder to make} binary=${2:?the binary that it is for}
: "${CUDA_HOME:?where the toolkit is}"
rm -rf "$folder/objects"
mkdir -p "$folder/objects"
folder=$(cd "$folder" && pwd) binary=$(realpath "$binary")
manifest=$(cargo metadata --manifest-path "$root/Cargo.toml" --format-version 1 --locked --features cuda |
    python3 -c 'import json, sys
print(next(p["manifest_path"] for p in json.load(sys.stdin)["packages"] if p["name"] == "candle-kernels"))')
candle=$(dirname "$manifest")/src
# candle's kernels look at a float4 as eight bf16, which CUDA's compiler allows.
compile() {
    c++ -std=c++20 -O2 -g1 -w -fPIC -fno-strict-aliasing -I"$here" -I"$candle" -I"$CUDA_HOME/include" -I"$CUDA_HOME/include/cccl" \
        -I"$CUDA_HOME/../cudnn/include" "$@"
}

# A source and a list of the kernels in it; in those that match `waits` threads wait for one another.
kernels() {
    local source=$1 name=$2 waits=$3 unit=$folder/objects/$2.cpp
    # The one-instruction assembly of ours is a call here.
    sed 's/asm("\([a-z0-9.]*\) %0, %1;" : "=.\+"(\(\w*\)) : ".\+"(\(\w*\)));/emulated_asm("\1", \2, \3);/' \
        "$source" >"$folder/objects/$name.cu"
    printf '#include "device.h"\n#include "%s"\n' "$folder/objects/$name.cu" >"$unit"
    local names
    names=$(compile -E -P "$unit" | grep -o 'extern "C" *void [a-z0-9_]*' | sed 's/.* //' | sort -u)
    {
        echo "static const bool known = [] {"
        for kernel in $names; do
            echo "    EMULATED_KERNEL($kernel, $([[ $kernel =~ $waits ]] && echo true || echo false));"
        done
        echo "    return true;"
        echo "}();"
    } >>"$unit"
    compile -c "$unit" -o "$folder/objects/$name.o"
}
jobs=()
for name in affine binary cast conv fill indexing ternary unary; do
    kernels "$candle/$name.cu" "$name" "^$" & jobs+=($!)
done
kernels "$candle/reduce.cu" reduce "" & jobs+=($!)
kernels "$root/models/src/sampler/advance/kernel.cu" advance "^$" & jobs+=($!)
for name in layers attention gradients lists; do
    cat "$root"/models/src/gpu/kernels/{numbers,functions,"$name"}.cu >"$folder/objects/$name.ours"
    kernels "$folder/objects/$name.ours" "$name" "^(group_norm|norm_gradient|sums|modulate|softmax|attend)" & jobs+=($!)
done
for name in driver libraries; do
    compile -Wall -c "$here/$name.cpp" -o "$folder/objects/$name.o" & jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job"; done

# What else the binary's loader asks for.
nm --defined-only "$folder"/objects/*.o | sed -n 's/.* T //p' | sort -u >"$folder/objects/there"
nm --dynamic --undefined-only "$binary" |
    sed -n 's/.* \(\(cu[A-Z]\|cublas[A-Z]\|cudnn\|curand\)[A-Za-z0-9_]*\).*/\1/p' | sort -u |
    grep -v '^cublasLt' | comm -23 - "$folder/objects/there" >"$folder/objects/missing"
{
    echo '#include <cstdio>'
    echo '#include <cstdlib>'
    echo '#define MISSING(NAME) extern "C" void NAME() { std::fputs("emulated GPU: no " #NAME "\n", stderr); std::abort(); }'
    sed 's/.*/MISSING(&)/' "$folder/objects/missing"
} >"$folder/objects/missing.cpp"
compile -c "$folder/objects/missing.cpp" -o "$folder/objects/missing.o"

# One library under all the names, so that it is loaded once; each name's functions have its version, as theirs do.
# Each of candle's files has its own copy of the functions they share.
libraries=$(LC_ALL=C readelf -d "$binary" | sed -n 's/.*NEEDED.*\[\(lib\(cublas\|cudnn\|curand\)\.so[^]]*\)\].*/\1/p')
for name in $libraries; do
    prefix=${name#lib}
    echo "$name { global: ${prefix%%.*}*; };"
done >"$folder/objects/versions"
c++ -shared -Wl,--allow-multiple-definition "-Wl,--version-script=$folder/objects/versions" \
    -o "$folder/libcuda.so.1" "$folder"/objects/*.o
for name in $libraries libnvidia-ml.so.1; do ln -sf libcuda.so.1 "$folder/$name"; done

cat >"$folder/understudy" <<END
#!/bin/sh
export LD_LIBRARY_PATH="$folder:$CUDA_HOME/lib:$CUDA_HOME/../cudnn/lib"
exec "$binary" "\$@"
END
chmod +x "$folder/understudy"
