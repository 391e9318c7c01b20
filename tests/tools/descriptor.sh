#!/usr/bin/env bash
# Writes proto/marcot.binpb, the descriptor set that `buf breaking` compares with. Run it when a
# change of the API is meant to stay: from then on nobody may break what it holds.
set -euo pipefail
cd "$(dirname "$0")/../../proto"
../.tools/venv/bin/buf build --exclude-source-info -o marcot.binpb
printf 'proto/marcot.binpb: %s bytes\n' "$(stat -c %s marcot.binpb)"
