#!/usr/bin/env bash
# Clones one tree plain, over TLS and locally, and compares each clone with the original by
# compare.py, which shares no code with Marcot. Last line: `identical 3/3`.
#
#   COMPARE_BYTES    data stored in the tree, default 2G
#   COMPARE_ENTRIES  entries, default 2500
#   PLANT=1          plants eight differences in each clone first: then this must fail, and each
#                    of the eight must be reported
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/tools/pair.sh

need python3 python3
need setfacl acl
build_binaries release
make_work compare
make_certificates

password=between-two-shells
make_account comparer "$password"
python3 tests/tools/make_tree.py "$work/original" --bytes "${COMPARE_BYTES:-2G}" \
  --entries "${COMPARE_ENTRIES:-2500}" >&2
# What is not on the disk yet has no settled hole map.
sync -f "$work/original"
mkdir "$work/clones" "$work/state"

start donor "$bin/marcot-donor" --data-directory "$work/original" --listen 127.0.0.1:0 \
  --accounts "$work/accounts" --tls-cert "$work/tls/server.pem" --tls-key "$work/tls/server.key"
donor=$address
start recipient "$bin/marcot-recipient" --listen 127.0.0.1:0 --state-directory "$work/state" \
  --data-directory "$work/original" --allow-directory "$work/clones" --ssl-ca "$work/tls/ca.pem" \
  --donor-list "127.0.0.1:${donor##*:}"
recipient=$address

clone() {
  local name=$1 statement=$2
  say "cloning: $name"
  "$bin/marcot" --recipient "$recipient" sql "$statement" >&2
}

identical=0
compare() {
  local name=$1 status=0
  sync -f "$work/clones/$name"
  if [[ ${PLANT:-} == 1 ]]; then
    python3 tests/tools/plant.py "$work/original" "$work/clones/$name" all >"$work/planted"
  fi
  python3 tests/tools/compare.py --left-out "$work/original" "$work/clones/$name" \
    >"$work/report" || status=$?
  cat "$work/report"
  if [[ ${PLANT:-} == 1 ]]; then
    python3 tests/tools/plant.py check "$work/planted" "$work/report" ||
      die "$name: the report does not match what was planted"
    say "$name: all eight planted differences reported"
  fi
  if ((status == 0)); then identical=$((identical + 1)); fi
}

remote="CLONE INSTANCE FROM 'comparer'@'127.0.0.1':${donor##*:} IDENTIFIED BY '$password'"
clone plain "$remote DATA DIRECTORY = '$work/clones/plain' REQUIRE NO SSL"
compare plain
clone tls "$remote DATA DIRECTORY = '$work/clones/tls' REQUIRE SSL"
compare tls
clone local "CLONE LOCAL DATA DIRECTORY = '$work/clones/local'"
compare local

stop_daemons || die "a daemon did not end"
printf 'identical %d/3\n' "$identical"
((identical == 3))
