#!/usr/bin/env bash
# Set up, and train on this machine, alone or as one of several.
# Usage: ./run_train.sh [--section.key value ...] [--dry-run | --list-keys | --help]
#
# --dry-run    check the configuration for NGPU x NNODES processes and say what each would hold
#              and do; needs no GPU
# --list-keys  show every key of the configuration with its value
#
# CONFIG_FILE  configuration (default: train_configs/debug_cpu.toml)
# NGPU         processes on this machine (default: its GPUs, or 1)
# NNODES       machines (default: 1); each runs this script
# NODE_RANK    number of this machine, from 0 to NNODES-1
# MASTER_ADDR  address of the machine with NODE_RANK 0
# MASTER_PORT  a free port on it (default: 29500)
# LOG_RANK     ranks of this machine whose output is shown (default: 0)
set -euo pipefail
cd "$(dirname "$0")"

describes=""
for word in "$@"; do
    case "$word" in
        -h | --help) exec sed -n '2,/^set /{/^set /d; s/^# \{0,1\}//; p}' run_train.sh ;;
        --dry-run | --list-keys) describes=yes ;;
    esac
done

config_file="${CONFIG_FILE:-train_configs/debug_cpu.toml}"
[[ -f "$config_file" ]] || { echo "CONFIG_FILE=$config_file: no such file; see train_configs/." >&2; exit 1; }
for name in NGPU NNODES; do
    [[ "${!name:-1}" =~ ^[1-9][0-9]*$ ]] || { echo "$name=${!name} must be a number of at least 1." >&2; exit 1; }
done
scripts/setup.sh

machines=(--nodes "${NNODES:-1}")
[[ -z "${NGPU:-}" ]] || machines+=(--processes "$NGPU")
if [[ "${NNODES:-1}" -gt 1 && -z "$describes" ]]; then
    : "${MASTER_ADDR:?NNODES=$NNODES needs MASTER_ADDR, the address of the machine with NODE_RANK 0}"
    : "${NODE_RANK:?NNODES=$NNODES needs NODE_RANK, from 0 to $((NNODES - 1))}"
    machines+=(--node-rank "$NODE_RANK"
        --master-address "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi
exec .venv/bin/lighthouse train "$config_file" "${machines[@]}" --log-rank "${LOG_RANK:-0}" "$@"
