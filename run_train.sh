#!/usr/bin/env bash
# Train, on this machine or as one of several.
# Usage: ./run_train.sh [--dry-run] [--section.key value ...]
#
# --dry-run    check the configuration for NGPU x NNODES processes and say what each would hold
#              and do; needs no GPU
#
# CONFIG_FILE  configuration (default: train_configs/debug_cpu.toml)
# NGPU         processes on this machine (default: its GPUs, or 1)
# NNODES       machines (default: 1); each runs this script, with NODE_RANK 0 to NNODES-1
# MASTER_ADDR  address of the machine with NODE_RANK 0, and MASTER_PORT (default: 29500) a free port on it
# LOG_RANK     ranks whose output is shown (default: 0)
set -euo pipefail
cd "$(dirname "$0")"

config_file="${CONFIG_FILE:-train_configs/debug_cpu.toml}"
[[ -f "$config_file" ]] || { echo "CONFIG_FILE=$config_file: no such file; see train_configs/." >&2; exit 1; }
scripts/setup.sh

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
processes="${NGPU:-$((gpus > 0 ? gpus : 1))}"
if [[ "${1:-}" == --dry-run ]]; then
    NGPU="$processes" exec .venv/bin/python -m torchtitan.models.llama3_lighthouse.dry_run \
        --job.config_file "$config_file" "${@:2}"
fi
if [[ "${NNODES:-1}" -gt 1 ]]; then
    : "${MASTER_ADDR:?NNODES=$NNODES needs MASTER_ADDR, the address of the machine with NODE_RANK 0}"
    : "${NODE_RANK:?NNODES=$NNODES needs NODE_RANK, from 0 to $((NNODES - 1))}"
    rendezvous=(--nnodes "$NNODES" --node-rank "$NODE_RANK"
        --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
else
    rendezvous=(--rdzv-backend c10d --rdzv-endpoint localhost:0)
fi
if ((gpus == 0)); then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(($(getconf _NPROCESSORS_ONLN) / processes > 0 ? $(getconf _NPROCESSORS_ONLN) / processes : 1))}"
fi
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

exec .venv/bin/torchrun --nproc-per-node "$processes" "${rendezvous[@]}" \
    --local-ranks-filter "${LOG_RANK:-0}" --role rank --tee 3 \
    -m torchtitan.models.llama3_lighthouse.train --job.config_file "$config_file" "$@"
