#!/usr/bin/env bash
# Trains on a Slurm cluster. Two minutes before the time limit it saves a checkpoint
# and ends with code 143.
set -euo pipefail

if [[ $# -lt 4 ]]; then
    echo "Usage: [GPUS=8 GPUS_PER_NODE=8 CPUS_PER_TASK=5 SRUN_ARGS=]" \
        "$0 PARTITION JOB_NAME CONFIG WORK_DIR [options of train.py]" >&2
    exit 2
fi
GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-$((GPUS < 8 ? GPUS : 8))}
read -ra srun_args <<< "${SRUN_ARGS:-}"

exec srun --partition "$1" --job-name "$2" \
    --gres "gpu:$GPUS_PER_NODE" \
    --ntasks "$GPUS" \
    --ntasks-per-node "$GPUS_PER_NODE" \
    --cpus-per-task "${CPUS_PER_TASK:-5}" \
    --kill-on-bad-exit=1 \
    --signal USR1@120 \
    "${srun_args[@]}" \
    python -u "$(dirname "$0")/train.py" "$3" --work-dir "$4" --launcher slurm "${@:5}"
