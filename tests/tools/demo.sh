#!/usr/bin/env bash
# Shows a whole clone on this machine, without root and without a database: makes a sample data
# directory, starts a donor and a recipient with TLS on free ports, clones, checks the copy.
#
# Needs Rust, a C compiler and openssl; Debian's own cargo and rustup need openssl as well.
#
#   DEMO_FLIP=1   alters one byte of the copy before the check; the demo then must fail
#   KEEP=1        leaves the directories for a look
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/tools/pair.sh
. tests/tools/sample.sh

# Alters the last byte of a file, and gives the file its old time back.
flip_byte() {
  local file=$1 last
  last=$(($(stat -c %s "$file") - 1))
  touch -r "$file" "$work/time"
  printf 'X' | dd of="$file" bs=1 seek="$last" conv=notrunc status=none
  touch -r "$work/time" "$file"
  say "DEMO_FLIP: altered byte $last of $file"
}

for tool in find diff dd truncate; do need "$tool" "findutils diffutils coreutils"; done
need cc build-essential
need openssl openssl
build_binaries dev
make_work demo

say "1. A sample data directory, TLS certificates, and an account 'demo' with BACKUP_ADMIN"
make_sample "$work/data"
make_certificates
password=demo-$$-$RANDOM$RANDOM
make_account demo "$password"
mkdir "$work/clones" "$work/state"

say "2. A donor and a recipient"
tls=(--tls-cert "$work/tls/server.pem" --tls-key "$work/tls/server.key")
start donor "$bin/marcot-donor" --data-directory "$work/data" --listen 127.0.0.1:0 \
  --accounts "$work/accounts" "${tls[@]}"
donor=$address
say "   donor      $donor, certificate $fingerprint"
start recipient "$bin/marcot-recipient" --listen 127.0.0.1:0 --state-directory "$work/state" \
  --allow-directory "$work/clones" --ssl-ca "$work/tls/ca.pem" "${tls[@]}" \
  --donor-list "127.0.0.1:${donor##*:}"
recipient=$address
say "   recipient  $recipient"

statement="CLONE INSTANCE FROM 'demo'@'127.0.0.1':${donor##*:} IDENTIFIED BY"
where="DATA DIRECTORY '$work/clones/data' REQUIRE SSL"
say "3. $statement '***' $where"
"$bin/marcot" --recipient "$recipient" --ca-file "$work/tls/ca.pem" \
  sql "$statement '$password' $where"

say "4. Is the copy the original?"
if [[ ${DEMO_FLIP:-} == 1 ]]; then flip_byte "$work/clones/data/shop/sparse.ibd"; fi
check "$work/data" "$work/clones/data"
"$bin/marcot" verify "$work/clones/data" >&2 || die "the copy is not what its certificate says"
say "   yes: names, types, modes, times, sizes, links, holes and every byte"
stop_daemons || die "a daemon did not end"

cat <<'NEXT'

What to try next:
  KEEP=1 make demo            keeps the directories, certificates and logs for a look
  DEMO_FLIP=1 make demo       alters one byte of the copy; the check must find it
  make test                   all tests; says what it installs for them
  make compare                a tree of every kind of entry, cloned three ways, compared
NEXT
[[ -d docs ]] && echo "  docs/                       how to set up a donor and a recipient of your own"
echo "demo: identical"
