#!/usr/bin/env bash
# Train on several GPUs of one or more machines; run it on each of them.
set -euo pipefail

if [[ $# -lt 2 ]]; then
    echo "Usage: [NNODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1 PORT=29500]" \
        "$0 CONFIG GPUS [options of train.py]" >&2
    exit 2
fi
NNODES=${NNODES:-1}

if [[ $NNODES == 1 && -z ${PORT:-} ]]; then
    # On a free port. This machine need not be able to resolve its own name.
    rendezvous=(--standalone --local-addr 127.0.0.1)
else
    rendezvous=(
        --nnodes "$NNODES"
        --node-rank "${NODE_RANK:-0}"
        --master-addr "${MASTER_ADDR:-127.0.0.1}"
        --master-port "${PORT:-29500}"
    )
fi

exec torchrun "${rendezvous[@]}" --nproc-per-node "$2" \
    "$(dirname "$0")/train.py" "$1" --launcher pytorch "${@:3}"
