#!/usr/bin/env bash
# Asks a real Prometheus every query of the dashboards and rules in deploy/monitoring, after a clone
# that was throttled, interrupted by kills of both sides and gone on with, and compares its figures
# with the clone's resource: dashboards.py beside this says how. Last line:
# `dashboards: N expressions answered`.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tests/tools/pair.sh

MIB=$((1 << 20))
LARGE_MIB=96
FILES=3

prometheus=.tools/servers/prometheus/usr/bin/prometheus
promtool=.tools/servers/prometheus/usr/bin/promtool
for tool in "$prometheus" "$promtool"; do
  [[ -x $tool ]] || die "no $tool; run tests/tools/setup.sh"
done
need python3 python3
python3 deploy/monitoring/dashboards.py --check
"$promtool" check rules deploy/monitoring/alerts.yaml >&2
"$promtool" test rules deploy/monitoring/alerts_test.yaml >&2

# A port that nobody listens on: daemons that are started again keep theirs.
free_port() {
  python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

start_donor() {
  start "donor$1" "$bin/marcot-donor" --data-directory "$work/data" \
    --listen "127.0.0.1:$donor_port" --admin-listen "127.0.0.1:$donor_admin" "${tls[@]}"
}

start_recipient() {
  start "recipient$1" "$bin/marcot-recipient" --listen "127.0.0.1:$recipient_port" \
    --state-directory "$work/state" --allow-directory "$work/clones" --ssl-ca "$work/tls/ca.pem" \
    --admin-listen "127.0.0.1:$recipient_admin" --donor-list '127.0.0.1:*' --donor-timeout 4s \
    "${tls[@]}"
}

# kill_daemon PID: without a word.
kill_daemon() {
  local pid left=()
  kill -KILL "$1"
  wait "$1" 2>/dev/null || true
  for pid in "${daemons[@]}"; do ((pid == $1)) || left+=("$pid"); done
  daemons=("${left[@]}")
}

marcot() {
  "$bin/marcot" --recipient "127.0.0.1:$recipient_port" --ca-file "$work/tls/ca.pem" "$@"
}

# begin TARGET OPTION...: starts a clone and leaves; sets `clone`.
begin() {
  local target=$1
  shift
  clone=$(MARCOT_DONOR_PASSWORD=none marcot --output json clone --donor "127.0.0.1:$donor_port" \
    --donor-user clone --data-directory "$work/clones/$target" --require-ssl --detach "$@" |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["name"])')
}

field() {
  marcot --output json get "$clone" |
    python3 -c 'import json, sys; clone = json.load(sys.stdin); print(eval(sys.argv[1]))' "$1"
}

# until_clone EXPRESSION: waits until it is true of the clone.
until_clone() {
  local deadline=$((SECONDS + 40))
  until [[ $(field "$1") == True ]]; do
    ((SECONDS < deadline)) || die "waited for $1: $(marcot get "$clone")"
    sleep 0.2
  done
}

build_binaries dev
make_work dashboards
make_certificates
tls=(--tls-cert "$work/tls/server.pem" --tls-key "$work/tls/server.key")
mkdir "$work/data" "$work/clones" "$work/state" "$work/prometheus"
for ((number = 0; number < FILES; number++)); do
  head -c $((LARGE_MIB * MIB)) /dev/urandom >"$work/data/large$number"
done
seq 1 4000000 >"$work/data/text"
for ((number = 0; number < 400; number++)); do
  head -c $((number * 97)) "$work/data/large0" >"$work/data/small$number"
done
donor_port=$(free_port) donor_admin=$(free_port)
recipient_port=$(free_port) recipient_admin=$(free_port) prometheus_port=$(free_port)

cat >"$work/prometheus.yml" <<YAML
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [$PWD/deploy/monitoring/alerts.yaml]
scrape_configs:
  - job_name: marcot
    static_configs:
      - targets: ['127.0.0.1:$donor_admin']
        labels: {namespace: db, service: donor}
      - targets: ['127.0.0.1:$recipient_admin']
        labels: {namespace: db, service: recipient}
YAML
"$promtool" check config "$work/prometheus.yml" >&2
"$prometheus" --config.file="$work/prometheus.yml" --storage.tsdb.path="$work/prometheus" \
  --web.listen-address="127.0.0.1:$prometheus_port" --log.level=warn \
  >"$work/prometheus.log" 2>&1 </dev/null &
daemons+=("$!")

say "1. A clone that is compressed, to its end"
start_donor 1
donor_pid=${daemons[-1]}
start_recipient 1
recipient_pid=${daemons[-1]}
ask=(python3 tests/tools/dashboards.py "http://127.0.0.1:$prometheus_port")
"${ask[@]}" wait
begin small --max-data-bandwidth 200MiB --compression 1
until_clone 'clone["state"] == "completed"'

say "2. A clone that is throttled, its recipient killed in the middle"
begin large --max-data-bandwidth 32MiB --concurrency 3
until_clone 'clone["verified_bytes"] > 120 << 20'
kill_daemon "$recipient_pid"
start_recipient 2
until_clone 'clone["resumes"] == 1 and clone["stages"][0]["data_speed"] > 0'
"${ask[@]}" running "$clone" "$bin/marcot" "127.0.0.1:$recipient_port" "$work/tls/ca.pem"

say "3. Its donor is killed: another snapshot; and the limit is changed"
kill_daemon "$donor_pid"
sleep 1
start_donor 2
donor_pid=${daemons[-1]}
until_clone 'clone["retries"] > 0 and clone["stages"][0]["data_speed"] > 0'
marcot limit "$clone" --max-data-bandwidth 64MiB --max-network-bandwidth 200MiB >&2
until_clone 'clone["state"] == "completed"'
sleep 2
"${ask[@]}" ended "$clone" "$bin/marcot" "127.0.0.1:$recipient_port" "$work/tls/ca.pem"
diff -r --exclude=.marcot-certificate "$work/data" "$work/clones/large" >&2

say "4. Clones that are cancelled and that fail, and calls that are refused"
begin cancelled --max-data-bandwidth 8MiB
until_clone 'clone["verified_bytes"] > 0'
marcot cancel "$clone" >&2
begin failed --max-data-bandwidth 8MiB
until_clone 'clone["verified_bytes"] > 8 << 20'
kill_daemon "$donor_pid"
until_clone 'clone["state"] == "failed"'
! begin large >"$work/refused" 2>&1 || die "a directory that is there was cloned to"
# Space is looked at every 5 s.
sleep 6
"${ask[@]}" all "127.0.0.1:$recipient_admin"
