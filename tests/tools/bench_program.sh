#!/usr/bin/env bash
# bench_program.sh NAME: builds all, then runs the measuring program marcot-NAME; its settings are at
# the head of tests/src/bin/marcot-NAME.rs. `make bench BENCH=NAME` runs it.
#
#   MARCOT_PROFILE   dev or release (default): whose daemons are measured
set -euo pipefail
cd "$(dirname "$0")/../.."

if [[ $1 == delta ]] && ! command -v rsync > /dev/null; then
  echo "make bench: rsync is not there; install rsync" >&2
  exit 1
fi
profile=${MARCOT_PROFILE:-release}
target=${CARGO_TARGET_DIR:-target}
cargo build --locked --quiet --profile "$profile" --workspace --bins
exec "$target/${profile/#dev/debug}/marcot-$1"
