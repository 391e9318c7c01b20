#!/usr/bin/env bash
# Drives both services with clients that are not ours, in plaintext on loopback: client.py reads a
# file from a donor without accounts and triggers a clone from one with accounts; grpcurl.sh lists,
# describes and calls. Last line: `clients: done`.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/tools/pair.sh

python=.tools/venv/bin/python
[[ -x $python ]] || die "no $python; run tests/tools/setup.sh"
build_binaries dev
make_work clients
make_account client "clients-of-others"
mkdir "$work/data" "$work/clones" "$work/state"
head -c 5000001 /dev/urandom >"$work/data/ibdata1"
printf 'small\n' >"$work/data/small"
truncate -s 8M "$work/data/hole"

start open "$bin/marcot-donor" --data-directory "$work/data" --listen 127.0.0.1:0
open=$address
start guarded "$bin/marcot-donor" --data-directory "$work/data" --listen 127.0.0.1:0 \
  --accounts "$work/accounts"
guarded=$address
start recipient "$bin/marcot-recipient" --listen 127.0.0.1:0 --state-directory "$work/state" \
  --allow-directory "$work/clones" --donor-list "127.0.0.1:${guarded##*:}"
recipient=$address

for file in ibdata1 small hole; do
  "$python" tests/tools/client.py read "$open" --path "$file" --output "$work/read"
  cmp "$work/data/$file" "$work/read"
done
"$python" tests/tools/client.py clone "$recipient" "CLONE INSTANCE FROM
  'client'@'127.0.0.1':${guarded##*:} IDENTIFIED BY 'clients-of-others'
  DATA DIRECTORY '$work/clones/data' REQUIRE NO SSL"
# The copy is the donor's tree, and the certificate in its root is for this copy.
diff -r --exclude=.marcot-certificate "$work/data" "$work/clones/data"
"$bin/marcot" verify "$work/clones/data"
tests/tools/grpcurl.sh "$open"
tests/tools/grpcurl.sh "$recipient"

stop_daemons || die "a daemon did not end"
echo "clients: done"
