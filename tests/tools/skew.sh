#!/usr/bin/env bash
# Version skew: a donor of today with a recipient of the first commit whose programs speak v1, and the
# reverse, clone a sample directory in both SSL modes, and each copy is compared with its source.
#
#   COMMIT=...       the old programs are built from it (default: that first commit)
#   MARCOT_PROFILE   of today's programs: dev (default) or release
#
# The last line of standard output is `skew: K/4`.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/tools/pair.sh
. tests/tools/sample.sh

# The protos of v1 are two hours older; in this one they have a donor, a recipient and a command line.
commit=${COMMIT:-7ead70a}

# Builds the programs of a commit, in a tree of their own; `old` is their directory.
build_old() {
  local tree=$target/skew/tree
  git cat-file -e "$commit^{commit}" 2>/dev/null ||
    die "commit $commit is not here: a shallow clone has no history; git fetch --unshallow"
  if [[ $(cat "$target/skew/commit" 2>/dev/null) != "$commit" ]]; then
    rm -rf "$tree"
    mkdir -p "$tree"
    git archive "$commit" | tar -x -C "$tree"
  fi
  # What is built of other crates is taken along: most versions are the same.
  if [[ ! -d $target/skew/target && -d $target/debug ]]; then
    mkdir -p "$target/skew/target/debug"
    local part
    for part in deps build .fingerprint; do
      cp -a "$target/debug/$part" "$target/skew/target/debug/"
    done
    find "$target/skew/target/debug" -maxdepth 2 -name '*marcot*' -exec rm -rf {} +
  fi
  say "building the programs of $commit"
  (cd "$tree" && CARGO_TARGET_DIR=$target/skew/target cargo build --locked --workspace --bins >&2)
  printf '%s\n' "$commit" >"$target/skew/commit"
  old=$target/skew/target/debug
}

# clone DONOR RECIPIENT SSL: programs of those directories clone the sample, which is compared.
clone() {
  local donor_bin=$1 recipient_bin=$2 ssl=$3 donor options=()
  rm -rf "$work/clones" "$work/state" "$work"/*.ready
  mkdir "$work/clones" "$work/state"
  start donor "$donor_bin/marcot-donor" --data-directory "$work/data" --listen 127.0.0.1:0 \
    --accounts "$work/accounts" "${tls[@]}"
  donor=$address
  # No program of then has a donor list.
  if [[ $recipient_bin != "$old" ]]; then options=(--donor-list "$donor"); fi
  start recipient "$recipient_bin/marcot-recipient" --listen 127.0.0.1:0 \
    --state-directory "$work/state" --allow-directory "$work/clones" \
    --ssl-ca "$work/tls/ca.pem" "${tls[@]}" "${options[@]}"
  "$recipient_bin/marcot" --recipient "$address" --ca-file "$work/tls/ca.pem" \
    sql "CLONE INSTANCE FROM 'skew'@'127.0.0.1':${donor##*:} IDENTIFIED BY '$password' \
         DATA DIRECTORY '$work/clones/data' $ssl" >&2
  check "$work/data" "$work/clones/data"
  stop_daemons || die "a daemon did not end"
}

need git git
need openssl openssl
build_binaries dev
target=$(realpath "$target")
build_old
make_work skew
make_sample "$work/data"
make_certificates
password=skew-$$-$RANDOM$RANDOM
tls=(--tls-cert "$work/tls/server.pem" --tls-key "$work/tls/server.key")
new=$bin right=0
for ssl in "REQUIRE SSL" "REQUIRE NO SSL"; do
  for pair in "old donor, new recipient:$old:$new" "new donor, old recipient:$new:$old"; do
    IFS=: read -r what donor_bin recipient_bin <<<"$pair"
    # The accounts file is the donor's: written by the command line of its version.
    rm -f "$work/accounts"
    bin=$donor_bin make_account skew "$password"
    say "$what, $ssl"
    clone "$donor_bin" "$recipient_bin" "$ssl"
    right=$((right + 1))
  done
done
printf 'skew: %d/4\n' "$right"
