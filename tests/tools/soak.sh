#!/usr/bin/env bash
# Clones of a live server, over and over: see tests/src/bin/marcot-soak.rs for the settings.
#
#   DATABASE=mariadb|mysql
#   SABOTAGE=skip-pages|old-redo|late-coordinates|no-lock|page-after-point, with mysql closed-binlog
#                 a donor that is wrong on purpose: the last line then shows fewer than all
set -euo pipefail
cd "$(dirname "$0")/../.."

case ${SABOTAGE:-} in
  '' | skip-pages | old-redo | late-coordinates | no-lock | page-after-point | closed-binlog) ;;
  *) echo "make soak: SABOTAGE=$SABOTAGE is none of those above" >&2; sed -n '4,5p' "$0" >&2; exit 2 ;;
esac
export MARCOT_FULL=${FULL:-0}

target=${CARGO_TARGET_DIR:-target}
export MARCOT_SABOTAGE=${SABOTAGE:-}
if [[ -z $MARCOT_SABOTAGE ]]; then
  cargo build --locked --quiet --workspace --bins
  exec "$target/debug/marcot-soak"
fi
# Built where the right ones are, for a build from nothing takes minutes; moved out of their way,
# and the right ones are built again.
mkdir -p "$target/sabotage"
trap 'cargo build --locked --quiet --workspace --bins' EXIT
if [[ ! -x $target/sabotage/marcot-soak || -n $(find donor recipient common tests/src -name '*.rs' -newer "$target/sabotage/marcot-soak" -print -quit) ]]; then
  cargo build --locked --quiet --workspace --bins --features marcot-donor/sabotage
  cp "$target"/debug/marcot-{donor,recipient,soak} "$target/sabotage/"
fi
"$target/sabotage/marcot-soak"
