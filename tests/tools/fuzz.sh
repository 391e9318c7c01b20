#!/usr/bin/env bash
# Runs the fuzz targets of tests/fuzz on stable Rust: libFuzzer with LLVM's coverage passes, without a
# sanitizer, which safe code has no need of.
#
#   fuzz.sh [TARGET...]           default: all
#
#   EACH=seconds   each target ends after so many seconds (default 300) or 10^7 executions, whichever
#                  comes first
#   JOBS=n         targets that run at a time (default 2)
#   PLANT=1        builds with a bug in each parser (tests/fuzz/plants), which is to be found
#   KEEP=1         afterwards puts the least inputs that reach all that was reached into
#                  tests/fuzz/corpus
#
# Says executions, seconds and the covered lines of each parser's files; below 80 % is an error from
# EACH=60 on. Inputs that found something new are kept in target/fuzz/corpus; a crash leaves its input
# in target/fuzz/crashes, and
#
#   target/fuzz/debug/TARGET target/fuzz/crashes/INPUT
#
# runs it again. The last line of standard output is `fuzz: N targets, no crash`, with PLANT=1
# `fuzz: found N/N`.
set -euo pipefail
cd "$(dirname "$0")/../.."

RUNS=10000000
LINES_PERCENT_MIN=80
# Of the corpus in the repository: every clone carries it.
KEPT_INPUT_BYTES_MAX=2000
KEPT_FILES_MAX=5000
KEPT_BYTES_MAX=$((2 << 20))
each=${EACH:-300}
jobs=${JOBS:-2}
built=$(realpath -m "${CARGO_TARGET_DIR:-target}")
fuzz=$built/fuzz

# build TREE DIRECTORY: the targets of a tree, into a directory, among what other builds of the project
# have left: dependencies are the same (`tidy` holds the two Cargo.lock against each other), Marcot's
# own crates are not.
build() {
  RUSTC_WRAPPER=$PWD/tests/tools/fuzz_rustc.sh CARGO_BUILD_BUILD_DIR=$built cargo build --quiet \
    --locked --target-dir "$2" --manifest-path "$1/tests/fuzz/Cargo.toml" --bins >&2
}

# limits TARGET CRASHES
limits() {
  # A page has 16 KiB; of text more is more of the same, and slow. An input that takes a minute is an
  # endless loop, on a busy machine as well.
  local bytes=2000
  case $1 in page | redo | mysql_redo) bytes=20000 ;; esac
  printf '%s\n' -max_total_time="$each" -runs="$RUNS" -max_len="$bytes" -timeout=60 \
    -rss_limit_mb=1024 -print_final_stats=1 -artifact_prefix="$fuzz/$2/$1-"
  if [[ -f tests/fuzz/dict/$1.dict ]]; then echo -dict="tests/fuzz/dict/$1.dict"; fi
}

# all_of FUNCTION TARGET...: calls it for each target, some at a time; fails when one has failed.
all_of() {
  local function=$1 target
  shift
  rm -f "$fuzz/failed"
  for target in "$@"; do
    while (($(jobs -rp | wc -l) >= jobs)); do wait -n || true; done
    { "$function" "$target" || touch "$fuzz/failed"; } &
  done
  wait
  [[ ! -e $fuzz/failed ]]
}

# run_one TARGET: ends without a crash.
run_one() {
  local corpus=$fuzz/corpus/$1 kept=tests/fuzz/corpus/$1 log=$fuzz/$1.log limits
  mkdir -p "$corpus" "$kept"
  mapfile -t limits < <(limits "$1" crashes)
  if ! "$programs/$1" "${limits[@]}" "$corpus" "$kept" "$fuzz/seeds/$1" >"$log" 2>&1; then
    tail -40 "$log" >&2
    printf 'fuzz: %s crashed; its input is in target/fuzz/crashes\n' "$1" >&2
    return 1
  fi
  # Without a word of the code it would only guess, and end as if nothing were wrong.
  if ! grep -q '^INFO: Loaded 1 modules' "$log"; then
    printf 'fuzz: %s does not tell libFuzzer which of its blocks run\n' "$1" >&2
    return 1
  fi
}

# find_one TARGET: the seeds do not find the planted bug, the fuzzer does.
find_one() {
  local corpus=$fuzz/planted-corpus/$1 log=$fuzz/$1-planted.log limits
  rm -rf "$corpus"
  mkdir -p "$corpus"
  if ! "$programs/$1" -runs=0 "$fuzz/seeds/$1" >"$log" 2>&1; then
    printf 'fuzz: %s: the seeds alone find what is planted\n' "$1" >&2
    return 1
  fi
  mapfile -t limits < <(limits "$1" planted-crashes)
  if "$programs/$1" "${limits[@]}" "$corpus" "$fuzz/seeds/$1" >"$log" 2>&1; then
    printf 'fuzz: %s: what is planted was not found in %s s\n' "$1" "$each" >&2
    return 1
  fi
  # Not any crash: the harness's own check, or a panic, of the planted file's target.
  if ! grep -q 'deadly signal' "$log"; then
    tail -20 "$log" >&2
    printf 'fuzz: %s ended without a panic\n' "$1" >&2
    return 1
  fi
  touch "$fuzz/planted-corpus/$1.found"
  printf 'fuzz: %s: found by %s: %s\n' "$1" \
    "$(sed -n 's/^#\([0-9]*\)\tNEW.*/\1/p' "$log" | tail -1 | sed 's/$/ executions/')" \
    "$(grep -m1 -A1 "panicked at" "$log" | tr '\n' ' ' | cut -c1-150)" >&2
}

# keep_one TARGET: of what was found and what was kept before.
keep_one() {
  local kept=tests/fuzz/corpus/$1 merged=$fuzz/merged/$1
  rm -rf "$merged"
  mkdir -p "$merged" "$kept"
  # Cut short: what needs more is among the seeds, which are made and not kept.
  "$programs/$1" -set_cover_merge=1 -max_len="$KEPT_INPUT_BYTES_MAX" -rss_limit_mb=2048 \
    "$merged" "$fuzz/corpus/$1" "$kept" >"$fuzz/$1-merge.log" 2>&1 || return 1
  rm -rf "$kept"
  mv "$merged" "$kept"
}

build_planted() {
  local tree=$fuzz/planted patch
  rm -rf "$tree"
  mkdir -p "$tree/tests"
  cp -r Cargo.toml common donor recipient proto "$tree"
  cp -r tests/fuzz "$tree/tests"
  for patch in tests/fuzz/plants/*.patch; do
    # Without a repository, so that paths are those of the tree.
    (cd "$tree" && GIT_CEILING_DIRECTORIES=$fuzz git apply "$OLDPWD/$patch")
  done
  build "$tree" "$fuzz/planted-programs"
}

scratch=$(mktemp -d -p "$([[ -w /dev/shm ]] && echo /dev/shm || echo "${TMPDIR:-/tmp}")" marcot-fuzz.XXXXXX)
trap 'rm -rf "$scratch"' EXIT
export TMPDIR=$scratch

begun=$SECONDS
build . "$fuzz"
programs=$fuzz/debug
if (($# == 0)); then mapfile -t all < <("$programs/marcot-fuzz" list) && set -- "${all[@]}"; fi
rm -rf "$fuzz/seeds"
"$programs/marcot-fuzz" seeds "$fuzz/seeds"
mkdir -p "$fuzz/crashes" "$fuzz/planted-crashes"

if [[ -n ${PLANT:-} ]]; then
  build_planted
  programs=$fuzz/planted-programs/debug
  printf 'fuzz: built in %d s\n' $((SECONDS - begun)) >&2
  rm -rf "$fuzz/planted-corpus"
  all_of find_one "$@" || true
  found=0
  for target in "$@"; do
    if [[ -f $fuzz/planted-corpus/$target.found ]]; then found=$((found + 1)); fi
  done
  printf 'fuzz: found %d/%d\n' "$found" "$#"
  ((found == $#))
  exit
fi

printf 'fuzz: built in %d s; each target: %s s or %d executions\n' $((SECONDS - begun)) "$each" "$RUNS" >&2
all_of run_one "$@"
"$programs/marcot-fuzz" coverage "$fuzz/corpus" "$PWD/tests/fuzz/corpus" "$fuzz/seeds" "$@" >"$fuzz/coverage"
poor=()
while read -r target reached lines percent; do
  read -r runs seconds < <(sed -n 's/^Done \([0-9]*\) runs in \([0-9]*\) second.*/\1 \2/p' "$fuzz/$target.log")
  printf 'fuzz: %-12s %8d executions %4d s, %5s %% of %d lines\n' \
    "$target" "$runs" "$seconds" "$percent" "$lines"
  if ((100 * reached < LINES_PERCENT_MIN * lines)); then poor+=("$target"); fi
done <"$fuzz/coverage"
if [[ -n ${KEEP:-} ]]; then
  all_of keep_one "$@"
  bytes=$(find tests/fuzz/corpus -type f -printf '%s\n' | awk '{ sum += $1 } END { print sum + 0 }')
  files=$(find tests/fuzz/corpus -type f | wc -l)
  printf 'fuzz: tests/fuzz/corpus has %d inputs of %d bytes\n' "$files" "$bytes"
  if ((files > KEPT_FILES_MAX || bytes > KEPT_BYTES_MAX)); then
    printf 'fuzz: at most %d inputs of %d bytes are to be kept\n' "$KEPT_FILES_MAX" "$KEPT_BYTES_MAX" >&2
    exit 1
  fi
fi
if ((${#poor[@]} > 0)); then
  if ((each >= 60)); then
    printf 'fuzz: below %d %% of lines, better seeds are needed: %s\n' "$LINES_PERCENT_MIN" "${poor[*]}" >&2
    exit 1
  fi
  printf 'fuzz: below %d %% of lines: %s; an error from EACH=60 on\n' "$LINES_PERCENT_MIN" "${poor[*]}" >&2
fi
printf 'fuzz: %d targets, no crash\n' "$#"
