#!/usr/bin/env bash
# A million tokens on two CPU cores: launch/million_tokens.sh [key.path=value ...]
# The operator alone at 1M and 4M tokens; then a model of two layers: three steps on one rank and on two context-parallel ranks,
# its losses by position, and how far the two agree. Half an hour and 11 GiB; docs/results/million_tokens.md tells what comes out.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$(cd "${VENV:-.venv}/bin" && pwd):$PATH"
runs=runs/million_tokens config=configs/real/million_tokens.yaml
time moba-megatron bench --full none --lengths 1M,4M --blocks 512:3 --dtypes fp32 --heads 1 --groups 1 --head-size 64 --runs 1 \
    --output $runs/operator
moba-megatron prepare data/million_tokens.yaml data/prepared/million_tokens
time python train.py $config run.dir=$runs/one_rank "$@"
time torchrun --nproc-per-node 2 train.py $config run.dir=$runs/two_ranks parallel.context=2 run.threads=1 "$@"
time moba-megatron evaluate $runs/one_rank
time torchrun --nproc-per-node 2 -m moba_megatron evaluate $runs/one_rank --parallel context=2 --output $runs/evaluated_by_two
python - $runs <<'PYTHON'
import json, sys
from pathlib import Path
runs = Path(sys.argv[1])
def losses(name):
    return [json.loads(line)["loss"] for line in open(runs / name / "metrics.jsonl")]
for one, two in zip(losses("one_rank"), losses("two_ranks"), strict=True):
    print(f"training loss {one:.7f} on one rank, {two:.7f} on two")
def evaluated(name):
    return json.loads(Path(sorted((runs / name / "evaluation").glob("step_3*.json"))[0]).read_text())["loss"]
print(f"validation loss {evaluated('one_rank'):.7f} by one rank, {evaluated('evaluated_by_two'):.7f} by two")
PYTHON
