#!/usr/bin/env bash
# Runs the stories of a live MySQL 9.7. Its server comes from Debian sid, into .tools/servers; when
# sid no longer offers it, target/mysql-not-offered says so, and this fails.
set -euo pipefail
cd "$(dirname "$0")/../.."

target=${CARGO_TARGET_DIR:-target}
mkdir -p "$target"
rm -f "$target/mysql-not-offered"
status=0
tests/tools/setup.sh test mysql || status=$?
if ((status == 3)); then
  echo "MySQL was not tested: Debian sid does not offer mysql-server-core; take the tick off README's table" |
    tee "$target/mysql-not-offered" >&2
fi
((status == 0)) || exit "$status"
export PATH=$PWD/.tools/bin:$PATH
cargo build --locked --workspace --bins
# Each story counts twice (.config/nextest.toml): one for each core.
cargo nextest run --locked --workspace --test mysql --no-fail-fast --test-threads $((2 * $(nproc))) "$@"
