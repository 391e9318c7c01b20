#!/usr/bin/env bash
# Runs every fuzz target of tests/fuzz for FUZZ_SECONDS (default 300) each, on stable Rust: libFuzzer
# with LLVM's coverage passes, without a sanitizer, which safe code has no need of.
#
#   fuzz.sh [TARGET...]           default: all
#
# Inputs that found something new are kept in target/fuzz/corpus; a crash leaves its input in
# target/fuzz/crashes, and
#
#   target/fuzz/HOST/release/TARGET target/fuzz/crashes/INPUT
#
# runs it again. The last line of standard output is `fuzz: N targets, no crash`.
set -euo pipefail
cd "$(dirname "$0")/../.."

seconds=${FUZZ_SECONDS:-300}
fuzz=${CARGO_TARGET_DIR:-$PWD/target}/fuzz
host=$(rustc --print host-tuple)
if (($# == 0)); then
  for path in tests/fuzz/targets/*.rs; do set -- "$@" "$(basename "$path" .rs)"; done
fi

# With a target named, these flags are not those of build scripts and macros, which run here.
export RUSTFLAGS="--cfg fuzzing -Ccodegen-units=1 -Cpasses=sancov-module \
  -Cllvm-args=-sanitizer-coverage-level=4 \
  -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
  -Cllvm-args=-sanitizer-coverage-pc-table \
  -Cllvm-args=-sanitizer-coverage-trace-compares"
cargo build --quiet --locked --release --target "$host" --target-dir "$fuzz" \
  --manifest-path tests/fuzz/Cargo.toml --bins >&2

# A first input of each kind; libFuzzer finds the rest.
mkdir -p "$fuzz"/seeds/{page,redo,mysql_redo,checkpoint,frm} "$fuzz/crashes"
zeros() { head -c "$1" /dev/zero; }
for layout in 00 01 02 03 04 05 06 07 08 09 0a 0b 0c; do
  for type in 45bf 8632 9219 8001 0008; do
    {
      printf "\x$layout\x01\x00\xde\xad\xbe\xef"
      zeros 20
      printf "\x${type:0:2}\x${type:2:2}"
      zeros 7
      printf '\x01\0\0\0\x07\0\x10\x78\x9c'
      zeros 64
    } >"$fuzz/seeds/page/$layout-$type"
  done
done
printf '\0\xfa\0\0\0\0\0\0\0\0\x08\x01\0\0\0\0' >"$fuzz/seeds/redo/checkpoint"
printf '\x01\x31\x02\x01\0\0\0\0\0\0\0\0\0\0\0\0' >"$fuzz/seeds/redo/encrypted"
{ printf '\0\0\0\x06' && zeros 3068; } >"$fuzz/seeds/mysql_redo/header"
{ printf 'Phys\0\0\0\0\0\0\0\0\0\0\x30\0MariaDB 10.11' && zeros 611; } >"$fuzz/seeds/checkpoint/header"
{ printf '\xfe\x01\x0a\x0c' && zeros 92; } >"$fuzz/seeds/frm/innodb"

for target in "$@"; do
  corpus=$fuzz/corpus/$target
  mkdir -p "$corpus"
  printf 'fuzz: %s for %s s\n' "$target" "$seconds" >&2
  if ! "$fuzz/$host/release/$target" -max_total_time="$seconds" -max_len=20000 -timeout=10 \
    -rss_limit_mb=1024 -print_final_stats=1 -artifact_prefix="$fuzz/crashes/$target-" \
    "$corpus" "$fuzz/seeds/$target" >"$fuzz/$target.log" 2>&1; then
    tail -40 "$fuzz/$target.log" >&2
    printf 'fuzz: %s crashed; its input is in target/fuzz/crashes\n' "$target" >&2
    exit 1
  fi
  grep -E '^Done|stat::number_of_executed_units' "$fuzz/$target.log" >&2
done
printf 'fuzz: %d targets, no crash\n' "$#"
