#!/usr/bin/env bash
# All lints; the first that fails ends the run.
set -euo pipefail
cd "$(dirname "$0")/../.."

step() {
  printf 'lint: %s\n' "$*" >&2
  "$@"
}

buf=.tools/venv/bin/buf
step cargo fmt --all --check
step cargo fmt --manifest-path tests/fuzz/Cargo.toml --check
step cargo clippy --quiet --locked --workspace --all-targets -- -D warnings
# Among what the workspace's own check has left: dependencies are the same.
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")
CARGO_BUILD_BUILD_DIR=$target step cargo clippy --quiet --locked --target-dir "$target/fuzz" \
  --manifest-path tests/fuzz/Cargo.toml --all-targets -- -D warnings
RUSTDOCFLAGS="-D warnings" step cargo doc --quiet --locked --workspace --no-deps
step cargo deny --locked check bans licenses sources
step cargo deny --locked --manifest-path tests/fuzz/Cargo.toml --config deny.toml check bans licenses sources
step "$buf" lint proto
step "$buf" format --diff --exit-code proto
step "$buf" breaking proto --against proto/marcot.binpb
step .tools/venv/bin/python tests/tools/api_reference.py --check
for script in .ci/run tests/tools/*.sh; do step bash -n "$script"; done
step .tools/venv/bin/python -c '
import ast, pathlib
for path in pathlib.Path("tests/tools").glob("*.py"):
    ast.parse(path.read_bytes(), str(path))
'
printf 'lint: clean\n'
