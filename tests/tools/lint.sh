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
RUSTDOCFLAGS="-D warnings" step cargo doc --quiet --locked --workspace --no-deps
step cargo deny --locked check bans licenses sources
step "$buf" lint proto
step "$buf" format --diff --exit-code proto
step "$buf" breaking proto --against proto/marcot.binpb
for script in .ci/run tests/tools/*.sh; do step bash -n "$script"; done
step .tools/venv/bin/python -c '
import ast, pathlib
for path in pathlib.Path("tests/tools").glob("*.py"):
    ast.parse(path.read_bytes(), str(path))
'
printf 'lint: clean\n'
