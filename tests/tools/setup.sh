#!/usr/bin/env bash
# Installs what the tests and lints need, and only what is missing. Safe to run again.
#
#   setup.sh [test] [lint] [mysql] [deploy] [packages]        default: test and lint
#
# mysql and deploy need test. mysql ends with 3 when the suite no longer offers that server.
#
# Goes into .tools/ of this tree: a Python environment (requirements.txt), cargo-nextest and
# cargo-deny where cargo does not have them yet. Debian packages are installed when this runs as
# root; otherwise a missing one is an error that names the command. Starts no service.
set -euo pipefail
cd "$(dirname "$0")/../.."

TRIES=4
tools=$PWD/.tools
mkdir -p "$tools"

say() { printf 'setup: %s\n' "$*" >&2; }

die() {
  say "$*"
  exit 1
}

# Registries fail now and then; what fails four times is an error.
retry() {
  local try
  for ((try = 1; try <= TRIES; try++)); do
    if "$@"; then return 0; fi
    say "try $try of $TRIES failed: $*"
    sleep $((try * try))
  done
  die "gave up: $*"
}

# Names the Debian package of each command that is missing; `wanted` are parts beside the tests.
missing_packages() {
  if [[ $wanted == *deploy* ]]; then
    command -v podman >/dev/null || echo podman
    # crun, which podman would take, wants more of this machine than it gives.
    command -v runc >/dev/null || echo runc
    [[ -x /usr/lib/podman/netavark ]] || echo netavark
    [[ -x /usr/lib/podman/aardvark-dns ]] || echo aardvark-dns
    command -v iptables >/dev/null || [[ -x /usr/sbin/iptables ]] || echo iptables
    command -v catatonit >/dev/null || [[ -x /usr/libexec/podman/catatonit ]] || echo catatonit
    command -v nsenter >/dev/null || echo util-linux
    command -v curl >/dev/null || echo curl
    command -v readelf >/dev/null || echo binutils
  fi
  if [[ $wanted == *packages* ]]; then
    command -v lintian >/dev/null || echo lintian
    command -v dpkg-shlibdeps >/dev/null || echo dpkg-dev
    command -v debootstrap >/dev/null || [[ -x /usr/sbin/debootstrap ]] || echo debootstrap
    command -v systemd-nspawn >/dev/null || echo systemd-container
    command -v nsenter >/dev/null || echo util-linux
    command -v strip >/dev/null || echo binutils
  fi
  command -v rsync >/dev/null || echo rsync
  command -v setfacl >/dev/null || echo acl
  command -v getfattr >/dev/null || echo attr
  command -v mkfs.xfs >/dev/null || [[ -x /usr/sbin/mkfs.xfs ]] || echo xfsprogs
  command -v mkfs.btrfs >/dev/null || [[ -x /usr/sbin/mkfs.btrfs ]] || echo btrfs-progs
  command -v mkfs.ext4 >/dev/null || [[ -x /usr/sbin/mkfs.ext4 ]] || echo e2fsprogs
  command -v openssl >/dev/null || echo openssl
  command -v c++ >/dev/null || echo g++
  command -v python3 >/dev/null || echo python3
  python3 -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
  [[ -x /usr/sbin/mariadbd ]] || command -v mariadbd >/dev/null || echo mariadb-server-core
  command -v mariadb >/dev/null || echo mariadb-client-core
  command -v mariadb-backup >/dev/null || echo mariadb-backup
  command -v sysbench >/dev/null || echo sysbench
  [[ -f /usr/share/keyrings/debian-archive-keyring.gpg ]] || echo debian-archive-keyring
}

install_packages() {
  local packages
  mapfile -t packages < <(missing_packages)
  if ((${#packages[@]} == 0)); then return 0; fi
  if ((EUID != 0)); then
    die "missing Debian packages; as root: apt-get install --no-install-recommends ${packages[*]}"
  fi
  say "installing Debian packages: ${packages[*]}"
  export DEBIAN_FRONTEND=noninteractive
  retry apt-get -q update >&2
  retry apt-get -q install -y --no-install-recommends "${packages[@]}" >&2
  mapfile -t packages < <(missing_packages)
  if ((${#packages[@]} > 0)); then die "still missing: ${packages[*]}"; fi
}

# Servers in trees of their own: of another suite, and what Debian 12 has beside the server itself
# (plugins, mariadb-binlog; prometheus with promtool), which as a package would start a service.
install_servers() {
  tests/tools/server_tree.sh mariadb-bookworm bookworm mariadb-server
  tests/tools/server_tree.sh mariadb-trixie trixie mariadb-server
  tests/tools/server_tree.sh prometheus bookworm prometheus
}

# A Debian 12 with nothing but what every one has, and systemd: packages are installed into copies of it.
install_clean_debian() {
  local tree=$tools/servers/debian-clean mirror
  if [[ -f $tree/.complete ]]; then return 0; fi
  mirror=$(tests/tools/server_tree.sh --mirror)
  say "making a clean Debian 12; this takes two minutes"
  mkdir -p "$tools/servers"
  # Not shown: the mirror's address is in it, and logs of CI are read elsewhere.
  retry make_clean_debian "$tree" "$mirror"
  touch "$tree/.complete"
}

make_clean_debian() {
  rm -rf --one-file-system "$1"
  PATH=$PATH:/usr/sbin debootstrap --variant=minbase --include=systemd,procps bookworm "$1" "$2" \
    >"$tools/debootstrap.log" 2>&1
}

# install_python [NAME]: the environment .tools/venv-NAME of requirements-NAME.txt.
install_python() {
  local requirements=tests/tools/requirements${1:+-$1}.txt venv=$tools/venv${1:+-$1}
  local stamp=$venv/requirements.txt
  if cmp -s "$requirements" "$stamp" && "$venv/bin/python" -c ''; then
    return 0
  fi
  say "installing into $(basename "$venv"): $(grep -v '^#' "$requirements" | tr '\n' ' ')"
  rm -rf "$venv"
  python3 -m venv "$venv"
  retry "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$requirements" >&2
  cp "$requirements" "$stamp"
}

# cargo finds `cargo-NAME` on the PATH; the Makefile puts .tools/bin there first.
install_cargo_tool() {
  local name=$1 version=$2
  if command -v "$name" >/dev/null; then return 0; fi
  say "building $name $version into .tools/bin; this takes some minutes"
  # Without optimisation: it is run a few times, and takes twice as long to build with.
  retry cargo install --quiet --debug --locked --root "$tools" --version "$version" "$name" >&2
}

export PATH=$tools/bin:$PATH
if (($# == 0)); then set -- test lint; fi
wanted=$*
for what in "$@"; do
  case $what in
    test)
      install_packages
      install_servers
      install_python
      install_cargo_tool cargo-nextest "^0.9"
      ;;
    mysql)
      install_packages
      tests/tools/server_tree.sh mysql-sid sid mysql-server-core mysql-client-core
      ;;
    deploy)
      install_packages
      install_python
      install_python deploy
      # What an entrypoint calls, beside the server of mariadb-bookworm.
      tests/tools/server_tree.sh shell-bookworm bookworm dash coreutils sed
      ;;
    packages)
      install_packages
      install_clean_debian
      ;;
    lint)
      install_packages
      install_python
      install_cargo_tool cargo-deny "=0.20.2"
      ;;
    *) die "no such part: $what" ;;
  esac
done
