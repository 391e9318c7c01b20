#!/usr/bin/env bash
# Cuts of a live server, over and over, without a copy: see tests/src/bin/marcot-cuts.rs for the
# settings. `make bench BENCH=cuts` runs it.
#
#   MARCOT_PROFILE   dev or release (default): whose donor is measured
set -euo pipefail
cd "$(dirname "$0")/../.."

profile=${MARCOT_PROFILE:-release}
target=${CARGO_TARGET_DIR:-target}
cargo build --locked --quiet --profile "$profile" --workspace --bins
exec "$target/${profile/#dev/debug}/marcot-cuts"
