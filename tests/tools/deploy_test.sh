#!/usr/bin/env bash
# `make deploy-test`: images built and run, every overlay rendered and checked, two of them played by
# podman. Tools: setup.sh deploy. Last line: `deployed K/K`.
#
#   PROFILE=dev         a build for tests; default release
#   KEEP=1              leaves volumes for a look; podman's own go
set -euo pipefail
cd "$(dirname "$0")/../.."

if ((EUID != 0)); then
  echo "deploy_test.sh: podman needs root here: networks, and volumes of another user" >&2
  exit 1
fi
target=$(realpath "${CARGO_TARGET_DIR:-target}" 2>/dev/null || echo "$PWD/target")
mkdir -p "$target"
work=$(mktemp -d "$target/deploy-test.XXXXXX")
# main.py has ended by then, and podman with it.
finish() { [[ ${KEEP:-} == 1 ]] && echo "kept: $work" >&2 || rm -rf "$work"; }
trap finish EXIT
# It cleans up on the way out, also when it is told to end.
trap 'kill -TERM "$main" 2>/dev/null; wait "$main"; exit 143' TERM INT
chmod 755 "$work"

version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
.tools/venv-deploy/bin/python tests/tools/deploy/main.py "$work" "$version" \
  "$PWD/.tools/servers/mariadb-bookworm" "$PWD/.tools/servers/shell-bookworm" &
main=$!
wait "$main"
