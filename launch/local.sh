#!/usr/bin/env bash
# Train on this machine: launch/local.sh RANKS CONFIG.yaml [key.path=value ...]
# Or evaluate what was trained: launch/local.sh RANKS evaluate RUN [--parallel context=RANKS ...]
# One rank a GPU, or one rank for a few CPU cores. RUN/status.json tells how a training ended.
#   RESTARTS   from the environment: how often all ranks may start again from the last checkpoint after one died: 0
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 2 ]; then
    echo "usage: launch/local.sh RANKS CONFIG.yaml [key.path=value ...]" >&2
    exit 2
fi
ranks=$1
shift
source launch/environment.sh
program_of "$1"
# With the store of the attempt before, gloo would not find its ranks again.
[ "${RESTARTS:-0}" = 0 ] || export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
echo "$ranks ranks, RESTARTS=${RESTARTS:-0}, $(say_environment)" >&2
# gloo and NCCL find the loopback device by themselves on one node.
exec "${VENV:-.venv}"/bin/torchrun --standalone --max-restarts "${RESTARTS:-0}" --nproc-per-node "$ranks" "${program[@]}" "$@"
