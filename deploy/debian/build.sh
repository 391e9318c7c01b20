#!/usr/bin/env bash
# Builds the Debian packages marcot-donor, marcot-recipient and marcot (the command line), for the Debian
# that this runs on.
#
#   deploy/debian/build.sh DIR
#
#   PROFILE=release         cargo's profile; dev is for tests
#   VERSION=0.1.0           of the packages; Cargo.toml's unless given
#   MAINTAINER='N <a@b>'    who publishes them
#   MARCOT_BIN_DIR=DIR      takes the programs from there; builds nothing
#
# Needs Rust, binutils and dpkg-dev. Prints the packages' paths, one a line.
set -euo pipefail
umask 022
root=$(cd "$(dirname "$0")/../.." && pwd)
here=$root/deploy/debian

die() {
  printf 'build.sh: %s\n' "$*" >&2
  exit 1
}

(($# == 1)) || die "usage: build.sh DIR"
mkdir -p "$1"
output=$(cd "$1" && pwd)
for tool in dpkg-deb dpkg-shlibdeps strip; do
  command -v "$tool" >/dev/null || die "$tool is missing; as root: apt-get install dpkg-dev binutils"
done
cd "$root"
version=${VERSION:-$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)}
[[ $version =~ ^[0-9][A-Za-z0-9.+~]*$ ]] || die "\`$version\` is no version of a package"
architecture=$(dpkg --print-architecture)
maintainer=${MAINTAINER:-The Marcot authors <marcot@localhost>}
profile=${PROFILE:-release}
if [[ -z ${MARCOT_BIN_DIR:-} ]]; then
  # With the whole workspace's features, so that libraries that are built serve here as well.
  cargo build --locked --profile "$profile" --workspace --bins >&2
  MARCOT_BIN_DIR=${CARGO_TARGET_DIR:-$root/target}/${profile/#dev/debug}
fi
bin=$(cd "$MARCOT_BIN_DIR" && pwd)
# The same commit gives the same packages.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y Cargo.toml)}
export SOURCE_DATE_EPOCH

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

put() { install -D -m "$1" "$2" "$tree$3"; }

# program NAME: stripped.
program() {
  install -d "$tree/usr/bin"
  strip -o "$tree/usr/bin/$1" "$bin/$1"
  chmod 755 "$tree/usr/bin/$1"
}

# page SECTION, from standard input.
page() {
  install -d "$tree/usr/share/man/man$2"
  gzip -9n >"$tree/usr/share/man/man$2/$1.$2.gz"
}

# completions NAME COMMAND...: what the command prints for each shell.
completions() {
  local name=$1 share=$tree/usr/share
  shift
  install -d "$share/bash-completion/completions" "$share/zsh/vendor-completions" \
    "$share/fish/vendor_completions.d"
  "$@" bash >"$share/bash-completion/completions/$name"
  "$@" zsh >"$share/zsh/vendor-completions/_$name"
  "$@" fish >"$share/fish/vendor_completions.d/$name.fish"
}

# service NAME SETTINGS: a daemon with its unit, settings and scripts.
service() {
  local package=$1 settings=$2 script
  program "$package"
  "$bin/$package" --man-page | page "$package" 8
  completions "$package" "$bin/$package" --completions
  put 644 "$here/$package.service" "/lib/systemd/system/$package.service"
  put 644 "$here/$settings" "/etc/marcot/$settings"
  put 644 "$here/$package.default" "/etc/default/$package"
  # As those of a recipient: given to the service's user, and closed to others, by its first start.
  install -d "$tree/var/cache/$package"
  printf '%s\n' "/etc/marcot/$settings" "/etc/default/$package" >"$tree/DEBIAN/conffiles"
  for script in postinst prerm postrm; do
    sed "s/@UNIT@/$package.service/g; s/@PACKAGE@/$package/g" "$here/service.$script" \
      >"$tree/DEBIAN/$script"
    chmod 755 "$tree/DEBIAN/$script"
  done
}

# finish PACKAGE FIELDS: what every package has, then the package.
finish() {
  local package=$1 fields=$2 depends
  put 644 "$here/copyright" "/usr/share/doc/$package/copyright"
  put 644 "$here/$package.lintian-overrides" "/usr/share/lintian/overrides/$package"
  {
    printf 'marcot (%s) unstable; urgency=medium\n\n' "$version"
    printf '  * What has changed is in CHANGELOG.md of the sources.\n\n'
    printf ' -- %s  %s\n' "$maintainer" "$(date -u -R -d "@$SOURCE_DATE_EPOCH")"
  } | gzip -9n >"$tree/usr/share/doc/$package/changelog.gz"
  # It wants to run where there is a source package.
  mkdir -p "$work/debian"
  : >"$work/debian/control"
  depends=$(cd "$work" && dpkg-shlibdeps -O "$tree"/usr/bin/* 2>/dev/null | sed -n 's/^shlibs:Depends=//p')
  [[ -n $depends ]] || die "dpkg-shlibdeps names no library of $package"
  {
    printf 'Package: %s\nSource: marcot\nVersion: %s\nArchitecture: %s\nMaintainer: %s\n' \
      "$package" "$version" "$architecture" "$maintainer"
    printf 'Installed-Size: %s\n' "$(du -k -s --apparent-size --exclude=DEBIAN "$tree" | cut -f1)"
    printf 'Depends: %s\nSection: database\nPriority: optional\n%s\n' "$depends" "$fields"
  } >"$tree/DEBIAN/control"
  (cd "$tree" && find . -type f ! -path './DEBIAN/*' -printf '%P\0' | LC_ALL=C sort -z | xargs -0 md5sum) \
    >"$tree/DEBIAN/md5sums"
  find "$tree" -exec touch --no-dereference -d "@$SOURCE_DATE_EPOCH" {} +
  dpkg-deb --root-owner-group --build "$tree" "$output/${package}_${version}_$architecture.deb" >&2
  printf '%s\n' "$output/${package}_${version}_$architecture.deb"
}

for package in marcot-donor marcot-recipient marcot; do
  tree=$work/$package
  mkdir -p "$tree/DEBIAN"
  case $package in
    marcot-donor)
      service marcot-donor donor.toml
      finish marcot-donor "Suggests: default-mysql-server | virtual-mysql-server, marcot
Description: clones of a live database for other hosts: the donor
 Marcot copies the data directory of a live MariaDB or MySQL to another host,
 whole and at one consistent point, over gRPC.
 .
 This is the service beside the database that is cloned. It reads the data
 directory as the database's own user, and cannot write it."
      ;;
    marcot-recipient)
      service marcot-recipient recipient.toml
      install -d "$tree/var/lib/marcot/state" "$tree/var/lib/marcot/clones"
      finish marcot-recipient "Recommends: marcot
Suggests: default-mysql-server | virtual-mysql-server
Description: clones of a live database from other hosts: the recipient
 Marcot copies the data directory of a live MariaDB or MySQL to another host,
 whole and at one consistent point, over gRPC.
 .
 This is the service on the host that clones are made on. It fetches, checks
 and installs them; one that was cut goes on where it was."
      ;;
    marcot)
      program marcot
      mkdir "$work/man"
      "$bin/marcot" man "$work/man" >&2
      for file in "$work"/man/*; do page "$(basename "${file%.*}")" "${file##*.}" <"$file"; done
      completions marcot "$bin/marcot" completions
      finish marcot "Description: clones of a live database: the command line
 Marcot copies the data directory of a live MariaDB or MySQL to another host,
 whole and at one consistent point, over gRPC.
 .
 This is the command that asks a recipient for clones, shows how they go on,
 and checks copies by their certificates."
      ;;
  esac
done
