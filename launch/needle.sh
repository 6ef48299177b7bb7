#!/usr/bin/env bash
# Needle in a haystack: launch/needle.sh [key.path=value ...]
# Makes the samples, trains MoBA and a sliding window of equal cost on them, asks both, and draws the answers side by side.
# docs/results/needle.md tells what comes out. What is there already is kept: run it again after an interruption.
set -euo pipefail
cd "$(dirname "$0")/.."
data=data/prepared
runs=runs/needle
if [ ! -d $data/needle_samples ]; then
    "${VENV:-.venv}"/bin/python -m moba_megatron.evaluation.tasks.corpus $data/needle_samples
fi
"${VENV:-.venv}"/bin/moba-megatron prepare $data/needle_samples/recipe.yaml $data/needle
maps=()
for name in moba recent; do
    "${VENV:-.venv}"/bin/python train.py configs/needle/$name.yaml run.dir=$runs/$name "$@"
    "${VENV:-.venv}"/bin/moba-megatron evaluate $runs/$name --tasks needle --attention moba --task-samples 20
    record=$(ls -t $runs/$name/evaluation/tasks_step_*_moba.json | head -n 1)
    maps+=("$name=$record")
done
"${VENV:-.venv}"/bin/python -m moba_megatron.evaluation.tasks.heat_map $runs/needle.png "${maps[@]}"
