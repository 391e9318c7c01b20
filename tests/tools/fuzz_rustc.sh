#!/usr/bin/env bash
# rustc for `fuzz.sh`: Marcot's own crates count which of their blocks run, all others are compiled as
# they are. cargo calls it: fuzz_rustc.sh RUSTC ARGUMENT...
set -euo pipefail

name=
type=
previous=
for argument; do
  case $previous in
    --crate-name) name=$argument ;;
    --crate-type) type=$argument ;;
  esac
  previous=$argument
done
case $name:$type in
  # Generated.
  marcot_proto:*) exec "$@" ;;
  # Functions that no target calls are lines that none reaches: they stay, and are told as such.
  marcot_fuzz:bin) exec "$@" -Clink-dead-code ;;
  marcot_*:lib) ;;
  *) exec "$@" ;;
esac
exec "$@" -Clink-dead-code -Cpasses=sancov-module \
  -Cllvm-args=-sanitizer-coverage-level=4 \
  -Cllvm-args=-sanitizer-coverage-prune-blocks=0 \
  -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
  -Cllvm-args=-sanitizer-coverage-pc-table \
  -Cllvm-args=-sanitizer-coverage-trace-compares
