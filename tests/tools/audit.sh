#!/usr/bin/env bash
# Looks the dependencies up among the published advisories (RustSec), as they are at this moment.
#
# Ends with 0 and `audit: clean`, with 1 and `audit: FAILED`, or with 3 and `audit: not run` with the
# reason, where the advisories cannot be had: that is never said to be clean. The last line also goes
# to the build's directory, for the end of .ci/run.
set -euo pipefail
cd "$(dirname "$0")/../.."

DATABASE=https://github.com/RustSec/advisory-db
SECONDS_MAX=60
summary=${CARGO_TARGET_DIR:-target}/audit-summary
mkdir -p "$(dirname "$summary")"

end() {
  printf 'audit: %s\n' "$2" | tee "$summary"
  exit "$1"
}

# The last line of what a command has said, as a reason.
reason() { grep -v '^[[:space:]]*$' <<<"$1" | tail -n 1 || true; }

export PATH=$PWD/.tools/bin:$PATH
command -v cargo-deny >/dev/null || end 3 'not run: cargo-deny is missing, tests/tools/setup.sh lint installs it'
export GIT_TERMINAL_PROMPT=0
if ! head=$(timeout "$SECONDS_MAX" git ls-remote --quiet "$DATABASE" HEAD 2>&1); then
  end 3 "not run: $DATABASE cannot be reached: $(reason "$head")"
fi
if ! said=$(timeout "$SECONDS_MAX" cargo deny --locked fetch db 2>&1); then
  end 3 "not run: $DATABASE cannot be fetched: $(reason "$said")"
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
check() { cargo deny --locked "$@" check advisories; }
if { check && check --manifest-path tests/fuzz/Cargo.toml --config deny.toml; } 2>&1 | tee "$log"; then
  end 0 "clean, by the advisory database at ${head:0:12}"
fi
# It asks for the database once more, which may fail for other reasons.
grep -q 'advisories FAILED' "$log" || end 3 "not run: $(reason "$(<"$log")")"
end 1 'FAILED: advisories concern dependencies, see above'
