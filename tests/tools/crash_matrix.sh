#!/usr/bin/env bash
# Kills and power cuts while a clone replaces a server's data: see
# tests/src/bin/marcot-crash-matrix.rs for the settings. Mounts file systems in images: needs root.
set -euo pipefail
cd "$(dirname "$0")/../.."

if ((EUID != 0)); then
  echo "make crash-matrix: mounts file systems in images; run it as root" >&2
  exit 1
fi
cargo build --locked --quiet --workspace --bins
exec "${CARGO_TARGET_DIR:-target}/debug/marcot-crash-matrix"
