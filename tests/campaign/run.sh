#!/usr/bin/env bash
# Attacks the program for some minutes (2 by default), and counts what held: tests/campaign/run.sh [MINUTES]
#
# UNDERSTUDY_BINARY names another program than target/debug/understudy, CAMPAIGN_SEED another order of cases, and
# CAMPAIGN_ONLY scenarios by name, with commas. README.md has them.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
if [ -z "${UNDERSTUDY_BINARY:-}" ]; then
    cargo build --locked --bin understudy
    UNDERSTUDY_BINARY=target/debug/understudy
fi
command=(python3 "$here/campaign.py" --program "$UNDERSTUDY_BINARY" --minutes "${1:-2}" --seed "${CAMPAIGN_SEED:-0}" --only "${CAMPAIGN_ONLY:-}")
# What is mounted, a small file system for instance, goes when the campaign ends, however it ends.
if [ "$(id -u)" = 0 ] && unshare --mount true 2>/dev/null; then
    command=(unshare --mount --propagation private "${command[@]}")
fi
exec "${command[@]}"
