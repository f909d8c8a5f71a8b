#!/usr/bin/env bash
# Builds the image without Docker and without a registry, starts it, and asks it for a picture.
#
#     deploy/image/build.sh [FOLDER]
#
# README.md beside this says what is needed. FOLDER (by default a new one, removed at the end) keeps the base
# images, the image and the picture; a second run with the same FOLDER uses its base images again.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source=$(cd "$here/../.." && pwd)

missing=()
for program in buildah debootstrap crun python3 rustc; do
    command -v "$program" >/dev/null || missing+=("$program")
done
if [ ${#missing[@]} -gt 0 ]; then
    echo "not found: ${missing[*]}; on Debian: apt-get install --no-install-recommends buildah debootstrap crun python3" >&2
    exit 1
fi
[ "$(id -u)" = 0 ] || { echo "run this as root: debootstrap and buildah make files of other users" >&2; exit 1; }

if [ $# -gt 0 ]; then
    mkdir -p "$1"
    work=$(cd "$1" && pwd)
else
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
fi
mkdir -p "$work/tmp"
# The builder's caches lie below TMPDIR.
export TMPDIR="$work/tmp" BUILDAH_ISOLATION=chroot
images() { buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"; }
have() { images inspect --type image "$1" >/dev/null 2>&1; }
said() { printf '\n== %s\n' "$*"; }

# The names are the Dockerfile's arguments, with the registry's host that only this machine has.
debian=localhost/debian:bookworm rust=localhost/rust:installed

if ! have "$debian"; then
    said "a base image: Debian bookworm"
    [ -d "$work/debian/etc" ] || debootstrap --variant=minbase bookworm "$work/debian" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}" >"$work/debootstrap.log"
    container=$(images from scratch)
    images add --quiet "$container" "$work/debian" / >/dev/null
    images config --cmd /bin/bash "$container"
    images commit --quiet --rm "$container" "$debian" >/dev/null
fi

if ! have "$rust"; then
    said "a base image: the toolchain installed here, $(cd "$source" && rustc --version)"
    sysroot=$(cd "$source" && rustc --print sysroot)
    mkdir -p "$work/rust/usr/local/rustup" "$work/rust/usr/local/cargo/bin"
    # Documentation is most of a toolchain, and nothing here reads it.
    tar --create --directory "$sysroot" --exclude ./share . | tar --extract --directory "$work/rust/usr/local/rustup"
    for program in cargo rustc; do
        ln -sf "../../rustup/bin/$program" "$work/rust/usr/local/cargo/bin/$program"
    done
    container=$(images from scratch)
    images add --quiet "$container" "$work/rust" / >/dev/null
    images commit --quiet --rm "$container" "$rust" >/dev/null
fi

# What this machine's clients need to reach a registry goes into the build as mounts, and into no image.
mounts=()
certificates=/usr/local/share/ca-certificates
[ -d "$certificates" ] && mounts+=(--volume "$certificates:$certificates:ro")
for config in "${CARGO_HOME:-$HOME/.cargo}"/config.toml "${CARGO_HOME:-$HOME/.cargo}"/config; do
    [ -f "$config" ] && mounts+=(--volume "$config:/usr/local/cargo/config.toml:ro") && break
done

said "the image, from Dockerfile and .dockerignore"
# VARIANT is its default: without a word, buildah 1.28 does not see which stages depend on it.
images build "${mounts[@]}" --layers=false --pull-never \
    --build-arg VARIANT=cpu --build-arg DEBIAN_IMAGE="$debian" --build-arg RUST_IMAGE="$rust" \
    --tag localhost/understudy --file "$source/Dockerfile" "$source"

said "the image, started"
images inspect --type image localhost/understudy >"$work/config.json"
container=$(images from localhost/understudy)
python3 "$here/start.py" "$(images mount "$container")" "$work/config.json" "$work"
images rm "$container" >/dev/null
