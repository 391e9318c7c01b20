#!/usr/bin/env bash
# Clones that are broken in every way, and go on: see tests/src/bin/marcot-faults/main.rs for the
# settings. Mounts file systems in images: needs root.
#
#   MARCOT_PROFILE   dev or release (default): whose daemons are struck
set -euo pipefail
cd "$(dirname "$0")/../.."

if ((EUID != 0)); then
  echo "make faults: mounts file systems in images; run it as root" >&2
  exit 1
fi
profile=${MARCOT_PROFILE:-release}
cargo build --locked --quiet --profile "$profile" --workspace --bins
exec "${CARGO_TARGET_DIR:-target}/${profile/#dev/debug}/marcot-faults"
