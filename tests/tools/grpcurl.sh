#!/usr/bin/env bash
# Asks a running daemon, in plaintext on loopback, with grpcurl (reflection v1alpha):
#
#   grpcurl.sh ADDRESS       lists and describes all services, calls health, and, on a donor,
#                            GetServerInfo; on a recipient, ListClones
#
# Last line: `grpcurl: N services`.
set -euo pipefail
cd "$(dirname "$0")/../.."

address=${1:?usage: grpcurl.sh ADDRESS}
ask() { .tools/venv/bin/grpcurl -plaintext -max-time 20 "$@"; }

services=$(ask "$address" list)
printf '%s\n' "$services"
for service in $services; do ask "$address" describe "$service"; done
health=$(ask "$address" grpc.health.v1.Health/Check)
printf '%s\n' "$health"
grep -q '"SERVING"' <<<"$health"
case $services in
  *marcot.donor.v1.DonorService*) ask "$address" marcot.donor.v1.DonorService/GetServerInfo ;;
  *marcot.recipient.v1.RecipientService*)
    ask "$address" marcot.recipient.v1.RecipientService/ListClones
    ;;
  *)
    echo "grpcurl.sh: no service of Marcot at $address" >&2
    exit 1
    ;;
esac
printf 'grpcurl: %d services\n' "$(wc -w <<<"$services")"
