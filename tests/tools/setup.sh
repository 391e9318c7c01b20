#!/usr/bin/env bash
# Installs what the tests and lints need, and only what is missing. Safe to run again.
#
#   setup.sh [test] [lint] [mysql]        default: test and lint
#
# mysql needs test. It ends with 3 when the suite no longer offers that server.
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

# Names the Debian package of each command that is missing.
missing_packages() {
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
# (plugins, mariadb-binlog), which as a package would start a service.
install_servers() {
  tests/tools/server_tree.sh mariadb-bookworm bookworm mariadb-server
  tests/tools/server_tree.sh mariadb-trixie trixie mariadb-server
}

install_python() {
  local stamp=$tools/venv/requirements.txt
  if cmp -s tests/tools/requirements.txt "$stamp" && "$tools/venv/bin/python" -c ''; then
    return 0
  fi
  say "installing into .tools/venv: $(grep -v '^#' tests/tools/requirements.txt | tr '\n' ' ')"
  rm -rf "$tools/venv"
  python3 -m venv "$tools/venv"
  retry "$tools/venv/bin/pip" install --quiet --disable-pip-version-check \
    -r tests/tools/requirements.txt >&2
  cp tests/tools/requirements.txt "$stamp"
}

# cargo finds `cargo-NAME` on the PATH; the Makefile puts .tools/bin there first.
install_cargo_tool() {
  local name=$1 version=$2
  if command -v "$name" >/dev/null; then return 0; fi
  say "building $name $version into .tools/bin; this takes some minutes"
  retry cargo install --quiet --locked --root "$tools" --version "$version" "$name" >&2
}

export PATH=$tools/bin:$PATH
if (($# == 0)); then set -- test lint; fi
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
    lint)
      install_packages
      install_python
      install_cargo_tool cargo-deny "=0.20.2"
      ;;
    *) die "no such part: $what" ;;
  esac
done
