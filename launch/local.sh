#!/usr/bin/env bash
# Train on this machine: launch/local.sh RANKS CONFIG.yaml [key.path=value ...]
# One rank a GPU, or one rank for a few CPU cores. RUN/status.json tells how it ended.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 2 ]; then
    echo "usage: launch/local.sh RANKS CONFIG.yaml [key.path=value ...]" >&2
    exit 2
fi
ranks=$1
shift
# gloo and NCCL find the loopback device by themselves on one node.
exec .venv/bin/torchrun --standalone --nproc-per-node "$ranks" train.py "$@"
