#!/usr/bin/env bash
# make bench: builds for release, then measures. See bench_targets.py, bench_mariadb.py and
# bench_program.sh. Without a name, or with `all`: all that has targets, 25 minutes at ROUNDS=3.
set -euo pipefail
cd "$(dirname "$0")/../.."
name=${1:-all}
case $name in
  cuts | delta | resume) exec tests/tools/bench_program.sh "$name" ;;
  all | memory-to-memory | durable | small-files | local | live | memory | mariadb) ;;
  *)
    echo "make bench: no bench '$name'; there are all, memory-to-memory, durable, small-files," \
      "local, live, memory, mariadb, cuts, delta, resume" >&2
    exit 2
    ;;
esac
. tests/tools/pair.sh

need python3 python3
need openssl openssl
case $name in all | durable | small-files) need rsync rsync ;; esac
PATH=$PATH:/usr/sbin
case $name in
  all | local)
    need mkfs.xfs xfsprogs
    need mkfs.btrfs btrfs-progs
    ;;
esac
case $name in
  all | live | mariadb)
    need mariadbd mariadb-server-core
    need mariadb-backup mariadb-backup
    need mbstream mariadb-backup
    need sysbench sysbench
    ;;
esac
build_binaries release
make_work bench
make_certificates
# shellcheck disable=SC2154  # pair.sh sets work and bin
options=(--bin "$bin" --work "$work" --tls "$work/tls")
case $name in
  mariadb) python3 tests/tools/bench_mariadb.py "${options[@]}" ;;
  all) python3 tests/tools/bench_targets.py "${options[@]}" ${JSON:+--json "$JSON"} ;;
  *) python3 tests/tools/bench_targets.py "$name" "${options[@]}" ${JSON:+--json "$JSON"} ;;
esac
