#!/usr/bin/env bash
# make bench: builds for release, then measures. See bench.py, bench_mariadb.py, bench_program.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
case ${1:-files} in cuts | delta | resume) exec tests/tools/bench_program.sh "$1" ;; esac
. tests/tools/pair.sh

need python3 python3
need openssl openssl
# shellcheck disable=SC2154  # pair.sh sets work and bin
if [[ ${1:-files} == files ]]; then need rsync rsync; fi
build_binaries release
make_work bench
make_certificates
if [[ ${1:-files} == mariadb ]]; then
  PATH=$PATH:/usr/sbin need mariadbd mariadb-server-core
  need mariadb-backup mariadb-backup
  need mbstream mariadb-backup
  need sysbench sysbench
  python3 tests/tools/bench_mariadb.py --bin "$bin" --work "$work" --tls "$work/tls"
  exit
fi
python3 tests/tools/bench.py "${1:-files}" --bin "$bin" --work "$work" --tls "$work/tls"
