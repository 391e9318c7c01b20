#!/usr/bin/env bash
# Puts a server of another Debian suite, or one that as a package would start a service, into a tree
# of its own, from where it runs by the tree's own loader: nothing of this machine is changed, and no
# root is needed.
#
#   server_tree.sh NAME SUITE PACKAGE...
#   server_tree.sh --mirror          prints the mirror, and does nothing else
#   server_tree.sh mariadb-trixie trixie mariadb-server-core mariadb-client-core
#
# The tree is .tools/servers/NAME; it is there and right when .tools/servers/NAME/.complete holds
# suite and packages. The mirror is the one that this machine's own apt uses. A suite that cannot
# be reached is an error; so is one that does not offer a package, with exit code 3.
set -euo pipefail
cd "$(dirname "$0")/../.."

TRIES=4

die() {
  printf 'server_tree: %s\n' "$*" >&2
  exit 1
}

# The first source of Debian's own archive, in either of apt's two formats.
mirror() {
  {
    cat /etc/apt/sources.list.d/*.sources 2>/dev/null | awk '/^URIs:/ { for (i = 2; i <= NF; i++) print $i }'
    cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null |
      awk '/^deb / { for (i = 2; i <= NF; i++) if ($i ~ /^https?:/) { print $i; break } }'
  } | grep -E '/debian/?$' | head -1
}

source=$(mirror) || true
[[ -n $source ]] || die "this machine's apt has no source that ends in /debian"
if [[ ${1:-} == --mirror ]]; then
  printf '%s\n' "$source"
  exit 0
fi
if (($# < 3)); then die "usage: server_tree.sh NAME SUITE PACKAGE..."; fi
name=$1 suite=$2
shift 2
tree=$PWD/.tools/servers/$name
want="$suite $*"
if [[ -f $tree/.complete && $(<"$tree/.complete") == "$want" ]]; then exit 0; fi
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[[ -f $keyring ]] || die "$keyring is missing: install debian-archive-keyring"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# apt drops to a user of its own for downloads.
chmod 755 "$work"
mkdir -p "$work"/{state/lists/partial,cache/archives/partial,etc/preferences.d,etc/apt.conf.d}
: >"$work/status"
printf 'deb [signed-by=%s] %s %s main\n' "$keyring" "$source" "$suite" >"$work/sources.list"

# An empty list of installed packages: what is downloaded is all that the server needs, libc too.
apt() {
  apt-get -q \
    -o Dir::State="$work/state" -o Dir::State::status="$work/status" \
    -o Dir::Cache="$work/cache" -o Dir::Etc="$work/etc" \
    -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=- \
    -o APT::Install-Recommends=false -o APT::Sandbox::User=root \
    -o Acquire::Check-Valid-Until=false -o Acquire::Languages=none \
    -o Debug::NoLocking=true "$@"
}

retry() {
  local try
  for ((try = 1; try <= TRIES; try++)); do
    if "$@" >"$work/log" 2>&1 && ! grep -q '^[EW]: Failed to fetch' "$work/log"; then return 0; fi
    sleep $((try * try))
  done
  # The mirror's address is not shown: logs of CI are read elsewhere.
  sed 's|https\?://[^ ]*|<mirror>|g' "$work/log" | tail -5 >&2
  die "suite $suite: '$*' failed $TRIES times"
}

printf 'server_tree: %s: %s from %s\n' "$name" "$*" "$suite" >&2
retry apt update
for package in "$@"; do
  offered=$(apt-cache -o Dir::State="$work/state" -o Dir::State::status="$work/status" \
    -o Dir::Cache="$work/cache" -o Dir::Etc="$work/etc" -o Dir::Etc::sourceparts=- \
    -o Dir::Etc::sourcelist="$work/sources.list" madison "$package")
  if [[ -z $offered ]]; then
    printf 'server_tree: suite %s does not offer %s\n' "$suite" "$package" >&2
    exit 3
  fi
done
retry apt -y --download-only install "$@"
rm -rf "$tree"
mkdir -p "$tree"
# Since trixie /lib and the like are links, and packages unpack through them.
for directory in bin sbin lib lib64; do
  mkdir -p "$tree/usr/$directory"
  ln -s "usr/$directory" "$tree/$directory"
done
for package in "$work"/cache/archives/*.deb; do
  dpkg-deb --fsys-tarfile "$package" | tar -x -C "$tree" --keep-directory-symlink --no-same-owner
done
rm -rf "$tree"/usr/share/{doc,man,locale,info}
printf '%s\n' "$want" >"$tree/.complete"
