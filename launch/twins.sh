#!/usr/bin/env bash
# The small experiments of configs/twins, on two CPU cores: hours in all, in pieces. Each call works for at most MINUTES (50),
# saves, and ends; the same call goes on. Finished sweeps are skipped; tables and figures go to docs/results/NAME/. A run that
# failed is named there, and the call ends with 1.
#   launch/twins.sh                       all of them
#   launch/twins.sh granularity           one
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$(cd "${VENV:-.venv}/bin" && pwd):$PATH"

samples() { # NAME LENGTHS TOKENS: samples of the needle task as a dataset
    [ -d "data/prepared/$1_samples" ] ||
        python -m moba_megatron.evaluation.tasks.corpus "data/prepared/$1_samples" --lengths "$2" --tokens "$3"
    moba-megatron prepare "data/prepared/$1_samples/recipe.yaml" "data/prepared/$1"
}

tiny_llama() { # FOLDER: random weights, as transformers makes and saves them
    [ -d "$1" ] || python - "$1" <<'PYTHON'
import sys
import torch, transformers
torch.manual_seed(1234)
shape = dict(vocab_size=512, hidden_size=80, intermediate_size=216, num_hidden_layers=3, num_attention_heads=5)
config = transformers.LlamaConfig(**shape, rope_theta=10000.0, rms_norm_eps=1e-5, max_position_embeddings=256)
transformers.AutoTokenizer.from_pretrained("data/prepared/python_twins/tokenizer").save_pretrained(sys.argv[1])
transformers.LlamaForCausalLM(config).save_pretrained(sys.argv[1])
PYTHON
}

end=$((SECONDS + ${MINUTES:-50} * 60)) failed=0
moba-megatron prepare data/python_twins.yaml data/prepared/python_twins
for name in ${@:-seeds scaling_8k more_blocks chinchilla hybrid_stages granularity selection_variants needle_variants layer_hybrid continued_pretraining scaling_32k mixtures gradients router}; do
    left=$(((end - SECONDS) / 60))
    if ((left <= 0)); then
        echo "time is up: the same command continues $name"
        exit "$failed"
    fi
    case $name in
        needle_variants) samples needle 64,128,256,512 4200000 ;;
        layer_hybrid) samples needle_256 64,128,256 3400000 ;;
        continued_pretraining) tiny_llama models/tiny_llama ;;
    esac
    moba-megatron scaling run "configs/twins/$name.yaml" --minutes "$left" && code=0 || code=$?
    case $code in
        0) ;;
        1) failed=1 ;;  # shown as failed below
        3) echo "time is up: the same command continues $name"; exit "$failed" ;;
        *) exit "$code" ;;
    esac
    moba-megatron scaling plot "configs/twins/$name.yaml" --output "docs/results/$name"
    moba-megatron scaling table "configs/twins/$name.yaml" --output "docs/results/$name"
done
exit "$failed"
