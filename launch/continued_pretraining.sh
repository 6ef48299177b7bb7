#!/usr/bin/env bash
# Continued pretraining to one million tokens, as a chain of Slurm jobs: each stage starts when the one before has finished, from
# its weights.
#   launch/continued_pretraining.sh MODEL GPUS WEIGHTS [sbatch options ...]
#   launch/continued_pretraining.sh llama3.1_8b 64 models/Llama-3.1-8B --partition=gpu
# MODEL: a folder of configs/continued_pretraining with all stages (qwen3_30b_a3b is one job: launch/slurm.sbatch). GPUS: 64,
# 256 or 1024, eight a node. WEIGHTS: a Hugging Face folder, which is the tokenizer of all stages too. From the environment:
# DATA, the folder that data/long_documents.yaml was prepared into (data/prepared/long_documents). After a stage that failed,
# run it again: stages that are finished end at once.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 3 ]; then
    echo "usage: launch/continued_pretraining.sh MODEL GPUS WEIGHTS [sbatch options ...]" >&2
    exit 2
fi
model=$1 gpus=$2 weights=$3
shift 3
variant=
[ "$gpus" = 64 ] || variant=:${gpus}gpus
stages=(128k 256k 512k 1m 1m_moba)
for stage in "${stages[@]}"; do
    file=configs/continued_pretraining/$model/$stage.yaml
    if [ ! -f "$file" ] || { [ -n "$variant" ] && ! grep -q "^  ${gpus}gpus:" "$file"; }; then
        echo "error: no $file$variant for MODEL = $model and GPUS = $gpus" >&2
        exit 2
    fi
done
for file in config.json tokenizer.json; do
    if [ ! -f "$weights/$file" ]; then
        echo "error: WEIGHTS = $weights is not a Hugging Face folder: it has no $file" >&2
        exit 2
    fi
done
data=${DATA:-data/prepared/long_documents}
common=(data.tokenizer="$weights" data.train="$data/train" data.validation="$data/validation")
# What the last job would trip over days from now is found here: settings, enough data of this tokenizer, weights of this shape.
# The weights of later stages are not there yet: all from the first, also where a stage has begun with others.
for stage in "${stages[@]}"; do
    config=configs/continued_pretraining/$model/$stage.yaml$variant
    "${VENV:-.venv}"/bin/moba-megatron doctor "$config" model.init_from="$weights" "${common[@]}" \
        'checkpoint.allow_changed=["model.init_from"]' >/dev/null
    echo "checked $config"
done
after=()
for stage in "${stages[@]}"; do
    config=configs/continued_pretraining/$model/$stage.yaml$variant
    job=$(sbatch --parsable --nodes=$((gpus / 8)) --job-name="$model-$stage" "${after[@]}" "$@" \
        launch/slurm.sbatch "$config" model.init_from="$weights" "${common[@]}")
    echo "job $job: $config from $weights"
    after=(--dependency="afterok:$job" --kill-on-invalid-dep=yes)
    weights=runs/continued_pretraining/$model/$stage
done
