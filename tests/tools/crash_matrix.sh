#!/usr/bin/env bash
# Kills and power cuts while a clone replaces a server's data: see
# tests/src/bin/marcot-crash-matrix.rs for the settings. Mounts file systems in images: needs root.
#
#   SABOTAGE=verify|journal-create|journal-append|generation|identity|exchange|move|all-syncs
#                 a recipient that leaves this sync out: power cuts find it. Their disk has btrfs then
#                 (FILE_SYSTEM): on ext4 each later sync makes good most of what was left out
set -euo pipefail
cd "$(dirname "$0")/../.."

if ((EUID != 0)); then
  echo "make crash-matrix: mounts file systems in images; run it as root" >&2
  exit 1
fi
target=${CARGO_TARGET_DIR:-target}
export MARCOT_SABOTAGE=${SABOTAGE:-}
if [[ -z $MARCOT_SABOTAGE ]]; then
  cargo build --locked --quiet --workspace --bins
  exec "$target/debug/marcot-crash-matrix"
fi
export ENDS=${ENDS:-cut} FILE_SYSTEM=${FILE_SYSTEM:-btrfs}
# As in soak.sh: moved out of the way of the right ones, which are built again.
mkdir -p "$target/sabotage-install"
trap 'cargo build --locked --quiet --workspace --bins' EXIT
if [[ ! -x $target/sabotage-install/marcot-crash-matrix || -n $(find donor recipient common tests/src -name '*.rs' -newer "$target/sabotage-install/marcot-crash-matrix" -print -quit) ]]; then
  cargo build --locked --quiet --workspace --bins --features marcot-recipient/sabotage
  cp "$target"/debug/marcot-{donor,recipient,crash-matrix} "$target/sabotage-install/"
fi
"$target/sabotage-install/marcot-crash-matrix"
