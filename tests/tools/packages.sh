#!/usr/bin/env bash
# `make packages`: the Debian packages are built, linted, installed into a clean Debian 12 that has
# booted its own systemd, used there, upgraded while a clone runs, removed and purged. Tools:
# setup.sh packages. Last line: `packages: K/K`.
#
#   PROFILE=dev    a build for tests; default release
#   MARCOT_BIN_DIR=DIR    programs that are there; builds nothing
#   KEEP=1         leaves packages, tree and journal for a look
#
# The tree is booted by systemd-nspawn, in a network of its own: units, their hardening and sd_notify
# are the real ones, and nothing of this machine is changed.
set -euo pipefail
cd "$(dirname "$0")/../.."

BOOT_SECONDS=60
CLONE_SECONDS=120
# On the scale of systemd-analyze, 0 to 10: most services of Debian have more than 9.
EXPOSURE_MAX=2.5
DATA_MIB=64

say() { printf 'packages: %s\n' "$*" >&2; }

die() {
  say "$*"
  exit 1
}

((EUID == 0)) || die "needs root: a tree of Debian is booted"
clean=$PWD/.tools/servers/debian-clean
[[ -f $clean/.complete ]] || die "$clean is missing: tests/tools/setup.sh packages"
target=$(realpath "${CARGO_TARGET_DIR:-target}" 2>/dev/null || echo "$PWD/target")
mkdir -p "$target"
work=$(mktemp -d "$target/packages.XXXXXX")
tree=$work/tree
nspawn=
leader=

finish() {
  local status=$?
  trap - EXIT INT TERM
  if [[ -n $leader ]] && kill -0 "$leader" 2>/dev/null; then
    if ((status != 0)); then
      run journalctl --no-pager -o cat -u marcot-donor -u marcot-recipient 2>/dev/null | tail -40 >&2 || true
    fi
    # What systemd takes for "end".
    kill -RTMIN+3 "$leader" || true
  fi
  if [[ -n $nspawn ]]; then
    timeout "$BOOT_SECONDS" tail --pid="$nspawn" -f /dev/null || kill -KILL "$nspawn" 2>/dev/null || true
    wait "$nspawn" 2>/dev/null || true
  fi
  if [[ ${KEEP:-} == 1 ]]; then say "kept: $work"; else rm -rf --one-file-system "$work"; fi
  exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# run COMMAND...: in the tree, as root.
run() {
  nsenter --target "$leader" --mount --uts --ipc --net --pid --cgroup --root --wd -- \
    env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive "$@"
}

right=0 wrong=0
# check WHAT COMMAND...
check() {
  local what=$1
  shift
  if "$@" >"$work/check.log" 2>&1; then
    right=$((right + 1))
    say "ok: $what"
  else
    wrong=$((wrong + 1))
    say "WRONG: $what"
    tail -20 "$work/check.log" >&2
  fi
}
not() { ! "$@"; }

# wait_for SECONDS COMMAND...
wait_for() {
  local deadline=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    ((SECONDS < deadline)) || return 1
    sleep 0.1
  done
}

# field NAME: of the newest clone.
field() {
  run marcot --output json get | python3 -c 'import json, sys; print(json.load(sys.stdin)[sys.argv[1]])' "$1"
}

version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
# Above it, and no version of ours.
next=$version+next
say "building $version and $next"
# What is built here is not kept: quick rather than small.
export DPKG_DEB_COMPRESSOR_LEVEL=1
deploy/debian/build.sh "$work/first" >"$work/first.list"
profile=${PROFILE:-release}
# Built by now.
export MARCOT_BIN_DIR=${MARCOT_BIN_DIR:-$target/${profile/#dev/debug}}
VERSION=$next deploy/debian/build.sh "$work/next" >"$work/next.list"
mapfile -t first <"$work/first.list"
mapfile -t upgraded <"$work/next.list"
((${#first[@]} == 3 && ${#upgraded[@]} == 3)) || die "not three packages: ${first[*]} ${upgraded[*]}"

for package in "${first[@]}"; do
  check "lintian finds no error and no warning in $(basename "$package")" \
    lintian --fail-on error,warning --tag-display-limit 0 "$package"
done
check "the same programs give the same bytes" bash -c "deploy/debian/build.sh '$work/again' >/dev/null &&
  diff <(cd '$work/first' && sha256sum *) <(cd '$work/again' && sha256sum *)"

cp -a --reflink=auto "$clean" "$tree"
mkdir "$tree/packages"
cp "${first[@]}" "${upgraded[@]}" "$tree/packages/"
systemd-nspawn --quiet --register=no --keep-unit --private-network --console=pipe --directory="$tree" \
  --boot </dev/null >"$work/nspawn.log" 2>&1 &
nspawn=$!
wait_for "$BOOT_SECONDS" pgrep -P "$nspawn" || die "the tree does not start: $(tail -3 "$work/nspawn.log")"
leader=$(pgrep -P "$nspawn" | head -1)
# Degraded: a clean tree may lack what some unit of its own wants.
wait_for "$BOOT_SECONDS" bash -c "$(declare -f run); leader=$leader; run systemctl is-system-running | grep -Eq 'running|degraded'" ||
  die "the tree does not boot: $(tail -3 "$work/nspawn.log")"

paths() { printf '/packages/%s\n' "${@##*/}"; }
mapfile -t first < <(paths "${first[@]}")
mapfile -t upgraded < <(paths "${upgraded[@]}")

check "they install into a clean Debian" run dpkg -i "${first[@]}"
for unit in marcot-donor marcot-recipient; do
  check "$unit is not started by its installation" not run systemctl is-active --quiet "$unit"
  check "$unit is not enabled by its installation" not run systemctl is-enabled --quiet "$unit"
  check "$unit: systemd has nothing to say of its unit" bash -c "$(declare -f run); leader=$leader
    said=\$(run systemd-analyze verify /lib/systemd/system/$unit.service 2>&1 | grep -v 'Command .man.*failed\|man .*: No such file'); echo \"\$said\"; [[ -z \$said ]]"
  check "$unit: exposure is below $EXPOSURE_MAX" run systemd-analyze security --no-pager \
    --threshold="${EXPOSURE_MAX/./}" "$unit.service"
done
for file in /usr/share/man/man8/marcot-donor.8.gz /usr/share/man/man8/marcot-recipient.8.gz \
  /usr/share/man/man1/marcot.1.gz /usr/share/man/man1/marcot-clone.1.gz \
  /usr/share/bash-completion/completions/marcot /usr/share/zsh/vendor-completions/_marcot-donor \
  /usr/share/fish/vendor_completions.d/marcot-recipient.fish; do
  check "$file is there" run dpkg -S "$file"
done

# As a server's package would.
run useradd --system --home-dir /nonexistent --shell /usr/sbin/nologin mysql
run install -d -o mysql -g mysql -m 700 /var/lib/mysql /var/lib/mysql/shop
run bash -c "head -c ${DATA_MIB}M /dev/urandom >/var/lib/mysql/ibdata1; seq 100000 >/var/lib/mysql/shop/orders
  chown -R mysql:mysql /var/lib/mysql; chmod 660 /var/lib/mysql/ibdata1 /var/lib/mysql/shop/orders"
digest() { run bash -c "cd '$1' && find . -type f ! -name .marcot-certificate -exec sha256sum {} + | sort -k2"; }
digest /var/lib/mysql >"$work/data"

check "the settings of the package are right" bash -c "$(declare -f run); leader=$leader
  run marcot-recipient --config /etc/marcot/recipient.toml --check-config && run marcot-donor --config /etc/marcot/donor.toml --check-config"
run sed -i -e 's/^engine = .*/engine = "files"/' -e '/^database-/d' /etc/marcot/donor.toml
run bash -c 'echo "donor-list = [\"127.0.0.1:4407\"]" >>/etc/marcot/recipient.toml; echo a token >/etc/marcot/accounts-of-ours'
settings() { run sha256sum /etc/marcot/donor.toml /etc/marcot/recipient.toml; }
settings >"$work/settings"
check "both services start, and systemd is told" run systemctl enable --now marcot-donor marcot-recipient
check "the donor cannot write what it serves" bash -c "$(declare -f run); leader=$leader
  run nsenter --target \$(run systemctl show --value --property MainPID marcot-donor) --mount \
    touch /var/lib/mysql/written 2>&1 | grep 'Read-only file system'"

statement() { printf "CLONE INSTANCE FROM 'clone'@'127.0.0.1':4407 IDENTIFIED BY 'x' DATA DIRECTORY '/var/lib/marcot/clones/%s'" "$1"; }
same() { diff "$work/data" <(digest "/var/lib/marcot/clones/$1"); }
check "a clone completes" run marcot sql "$(statement one)"
check "it is the data" same one
check "it is what its certificate says" run marcot verify /var/lib/marcot/clones/one

say "a clone that takes long, and an upgrade meanwhile"
run marcot sql "$(statement two)" --max-data-bandwidth 1MiB --detach >"$work/begun" 2>&1 ||
  die "the second clone does not begin: $(cat "$work/begun")"
copied() { (($(field verified_bytes) > 2 << 20)); }
wait_for "$CLONE_SECONDS" copied || die "the second clone copies nothing"
donor=$(run systemctl show --value --property MainPID marcot-donor)
recipient=$(run systemctl show --value --property MainPID marcot-recipient)
check "they are upgraded while it runs" run dpkg -i "${upgraded[@]}"
check "it has not ended before" test "$(field state)" = in_progress
for unit in "marcot-donor $donor" "marcot-recipient $recipient"; do
  read -r unit pid <<<"$unit"
  check "$unit $next is installed" bash -c "[[ \$(dpkg-query --admindir=$tree/var/lib/dpkg -f '\${Version}' -W $unit) == $next ]]"
  check "$unit runs" run systemctl is-active --quiet "$unit"
  check "$unit was restarted" bash -c "[[ \$($(declare -f run); leader=$leader; run systemctl show --value --property MainPID $unit) != $pid ]]"
done
check "settings that were changed are kept" diff "$work/settings" <(settings)
run marcot limit - --max-data-bandwidth 0 >/dev/null
ended() { [[ $(field state) == completed ]]; }
check "the clone goes on and completes" wait_for "$CLONE_SECONDS" ended
check "it was taken up again" test "$(field resumes)" -ge 1
check "it is the data" same two

check "they are purged" run dpkg --purge marcot-donor marcot-recipient marcot
for unit in marcot-donor marcot-recipient; do
  check "$unit has ended" not run pgrep -f "/usr/bin/$unit"
  check "$unit is unknown to systemd" not run systemctl cat "$unit"
done
check "the database is as it was" diff "$work/data" <(digest /var/lib/mysql)
check "clones are left" same one
check "and their history" run bash -c 'ls /var/lib/marcot/state/* >/dev/null'
check "files of the operator's own are left" run test -f /etc/marcot/accounts-of-ours
check "settings are gone" not run test -e /etc/marcot/donor.toml -o -e /etc/default/marcot-donor
check "links of units are gone" not run test -e /etc/systemd/system/multi-user.target.wants/marcot-donor.service

printf 'packages: %d/%d\n' "$right" $((right + wrong))
((wrong == 0))
