#!/usr/bin/env bash
# Evaluates on several GPUs. With several machines, run it on each machine.
set -euo pipefail

if [[ $# -lt 3 ]]; then
    echo "Usage: [NNODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1 PORT=29500]" \
        "$0 CONFIG CHECKPOINT GPUS [options of test.py]" >&2
    exit 2
fi
NNODES=${NNODES:-1}

if [[ $NNODES == 1 && -z ${PORT:-} ]]; then
    # Uses a free port. --local-addr makes a lookup of the host name unnecessary.
    rendezvous=(--standalone --local-addr 127.0.0.1)
else
    rendezvous=(
        --nnodes "$NNODES"
        --node-rank "${NODE_RANK:-0}"
        --master-addr "${MASTER_ADDR:-127.0.0.1}"
        --master-port "${PORT:-29500}"
    )
fi

exec torchrun "${rendezvous[@]}" --nproc-per-node "$3" \
    "$(dirname "$0")/test.py" "$1" "$2" --launcher pytorch "${@:4}"
