# shellcheck shell=bash
# A donor and a recipient for a script: builds them, starts them on free ports, stops them.
# Source it from the root of the tree. It sets `bin` and `work`, and its trap ends what it started,
# by process id, and removes `work`; KEEP=1 leaves `work` there.
#
#   MARCOT_PROFILE   dev or release; the script's own default otherwise
#   MARCOT_BIN_DIR   use the binaries there; build nothing

STOP_SECONDS=15
READY_SECONDS=30
daemons=()
target=${CARGO_TARGET_DIR:-$PWD/target}

say() { printf '%s\n' "$*" >&2; }

die() {
  say "$(basename "$0"): $*"
  exit 1
}

# need COMMAND PACKAGE: says what to install when it is not there.
need() {
  command -v "$1" >/dev/null || die "$1 is missing; as root: apt-get install $2"
}

build_binaries() {
  local profile=${MARCOT_PROFILE:-$1}
  if [[ -n ${MARCOT_BIN_DIR:-} ]]; then
    bin=$MARCOT_BIN_DIR
  else
    need cargo "nothing: see https://www.rust-lang.org/tools/install"
    say "building ($profile)"
    # The whole workspace, as test.sh does: another choice of packages would build other features.
    cargo build --locked --profile "$profile" --workspace --bins >&2
    bin=$target/${profile/#dev/debug}
  fi
  local name
  for name in marcot-donor marcot-recipient marcot; do
    [[ -x $bin/$name ]] || die "no binary $bin/$name"
  done
}

# make_work NAME: a new directory on the build's file system; /tmp may be memory.
make_work() {
  local parent=${MARCOT_WORK_DIR:-$target}
  mkdir -p "$parent"
  work=$(cd "$(mktemp -d "$parent/$1.XXXXXX")" && pwd)
  trap finish EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
}

finish() {
  local status=$?
  trap - EXIT INT TERM
  stop_daemons || status=1
  if ((status != 0)); then
    local log
    for log in "$work"/*.log; do
      [[ -s $log ]] || continue
      say "last lines of $(basename "$log"):"
      tail -n 20 "$log" >&2
    done
  fi
  if [[ ${KEEP:-} == 1 ]]; then
    say "kept: $work"
  else
    # Without root, what is in a directory that may not be written could not be removed.
    find "$work" -type d ! -perm -700 -exec chmod u+rwx {} +
    rm -rf "$work"
  fi
  exit "$status"
}

# start NAME COMMAND...: runs it in the background until it serves. Sets `address` and
# `fingerprint` from what it tells in its ready file.
start() {
  local name=$1 ready=$work/$1.ready
  shift
  "$@" --ready-file "$ready" >"$work/$name.log" 2>&1 </dev/null &
  local pid=$!
  daemons+=("$pid")
  local deadline=$((SECONDS + READY_SECONDS))
  until [[ -s $ready ]]; do
    kill -0 "$pid" 2>/dev/null || die "$name ended before it served"
    ((SECONDS < deadline)) || die "$name does not serve after $READY_SECONDS s"
    sleep 0.05
  done
  address=$(ready_field "$ready" listen)
  # shellcheck disable=SC2034  # for the script that sources this
  fingerprint=$(ready_field "$ready" fingerprint)
  [[ $address =~ :[1-9][0-9]*$ ]] || die "$name tells no address: $(cat "$ready")"
}

ready_field() {
  tr -d '\n' <"$1" | sed -n "s/.*\"$2\" *: *\"\([^\"]*\)\".*/\1/p"
}

# Asks each daemon to end; one that does not is killed, and that is an error.
stop_daemons() {
  local pid deadline status=0
  for pid in "${daemons[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
  deadline=$((SECONDS + STOP_SECONDS))
  for pid in "${daemons[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do
      if ((SECONDS >= deadline)); then
        say "process $pid does not end on SIGTERM; killed"
        kill -KILL "$pid" 2>/dev/null || true
        status=1
        break
      fi
      sleep 0.05
    done
    wait "$pid" 2>/dev/null || true
  done
  daemons=()
  return "$status"
}

# A CA and a server certificate for localhost, in $work/tls.
make_certificates() {
  need openssl openssl
  local tls=$work/tls key=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes)
  mkdir -m 700 "$tls"
  printf '%s\n' 'basicConstraints=critical,CA:FALSE' 'keyUsage=critical,digitalSignature' \
    'extendedKeyUsage=serverAuth,clientAuth' 'subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1' \
    >"$tls/server.ext"
  {
    openssl req -x509 "${key[@]}" -days 30 -subj "/CN=Marcot $$ test CA" -keyout "$tls/ca.key" \
      -out "$tls/ca.pem" -addext keyUsage=critical,keyCertSign
    openssl req "${key[@]}" -subj /CN=localhost -keyout "$tls/server.key" -out "$tls/server.csr"
    openssl x509 -req -in "$tls/server.csr" -CA "$tls/ca.pem" -CAkey "$tls/ca.key" -days 30 \
      -CAcreateserial -extfile "$tls/server.ext" -out "$tls/server.pem"
  } >"$work/openssl.txt" 2>&1 || die "openssl made no certificate: $(cat "$work/openssl.txt")"
}

# make_account NAME PASSWORD: in $work/accounts.
make_account() {
  printf '%s\n' "$2" | "$bin/marcot" account add "$1" --accounts "$work/accounts" \
    --privilege BACKUP_ADMIN >&2
}
