#!/usr/bin/env bash
# Starts a PostgreSQL of its own in a folder of its own, reached by a Unix socket alone, and runs the tests that need one:
# several servers that share experiments. tests/postgres/run.sh [--release]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# Debian keeps the programs of every version in a folder apart.
newest=$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -1 || true)
PATH=$PATH:$newest
if ! command -v initdb >/dev/null || ! command -v pg_ctl >/dev/null; then
    echo "tests/postgres/run.sh: no initdb and pg_ctl here; install PostgreSQL 13 or later (Debian: apt-get install postgresql)" >&2
    exit 1
fi

folder=$(mktemp -d)
# PostgreSQL refuses to run as root.
as=()
if [ "$(id -u)" = 0 ]; then
    user=nobody
    if id postgres >/dev/null 2>&1; then user=postgres; fi
    chown "$user" "$folder"
    chmod 755 "$folder"
    as=(setpriv --reuid "$user" --regid "$(id -g "$user")" --clear-groups)
fi
export UNDERSTUDY_TEST_DATABASE_CONTROL=$folder/control
cat >"$folder/control" <<END
#!/bin/sh
# stop, start or restart
cd "$folder" && exec ${as[*]} "$(command -v pg_ctl)" -D "$folder/data" -l "$folder/log" -m fast -w \$1 >/dev/null
END
chmod +x "$folder/control"
trap '"$folder/control" stop || true; rm -rf "$folder"' EXIT

(cd "$folder" && "${as[@]}" "$(command -v initdb)" -D "$folder/data" -U postgres --auth=trust --encoding=UTF8 --no-sync >/dev/null)
cat >>"$folder/data/postgresql.conf" <<END
listen_addresses = ''
unix_socket_directories = '$folder'
END
"$folder/control" start
export UNDERSTUDY_TEST_DATABASE_URL="postgres://postgres@${folder//\//%2F}/postgres"

cargo test --locked "$@" --lib postgres -- --ignored --nocapture --test-threads 2
cargo test --locked "$@" --test replicas -- --ignored --nocapture
