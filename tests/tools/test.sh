#!/usr/bin/env bash
# Runs all tests. The last line is nextest's own summary; it is also kept in target/test-summary.
# nextest runs no doc tests, so cargo runs those first.
set -euo pipefail
cd "$(dirname "$0")/../.."

target=${CARGO_TARGET_DIR:-target}
mkdir -p "$target"
# The binaries stand beside the tests that start them.
cargo build --locked --workspace --bins
cargo test --locked --workspace --doc --quiet
log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
# Most stories wait for servers more than they compute: one for each core leaves half of it idle. Those
# of a live server do not, and count twice (.config/nextest.toml).
threads=$((2 * $(nproc)))
# MySQL has a target of its own: its server comes from a suite that may cease to offer it.
cargo nextest run --locked --workspace --no-fail-fast --test-threads "$threads" -E "not binary(=mysql)" "$@" 2>&1 | tee "$log" || status=$?
sed 's/\x1b\[[0-9;]*m//g' "$log" | grep -E '^ *Summary ' | tail -1 >"$target/test-summary" || status=1
cat "$target/test-summary"
exit "$status"
