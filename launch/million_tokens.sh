#!/usr/bin/env bash
# A million tokens on two CPU cores: launch/million_tokens.sh [key.path=value ...]
# The operator alone at 1M and 4M tokens; then a model of two layers: three steps on one rank and on two context-parallel ranks,
# its losses by position, and how far the two agree. An hour and 13 GiB; docs/results/million_tokens.md tells what comes out.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$(cd "${VENV:-.venv}/bin" && pwd):$PATH"
runs=runs/million_tokens config=configs/real/million_tokens.yaml

measured() { # COMMAND ...: run it, then say how long it took and how much memory its largest process had
    python -c 'import resource, subprocess, sys, time
start = time.monotonic(); code = subprocess.run(sys.argv[1:]).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
print(f"measured: {time.monotonic() - start:.0f} s, {peak:.1f} GiB in the largest process: {sys.argv[1:]}", flush=True)
sys.exit(code)' "$@"
}

measured moba-megatron bench --full none --lengths 1M,4M --blocks 512:3 --dtypes fp32 --heads 1 --groups 1 --head-size 64 --runs 1 \
    --output $runs/operator
moba-megatron prepare data/million_tokens.yaml data/prepared/million_tokens
measured python train.py $config run.dir=$runs/one_rank "$@"
measured torchrun --nproc-per-node 2 train.py $config run.dir=$runs/two_ranks parallel.context=2 run.threads=1 "$@"
measured moba-megatron evaluate $runs/one_rank --attention moba
measured torchrun --nproc-per-node 2 -m moba_megatron evaluate $runs/one_rank --attention moba --parallel context=2 \
    --output $runs/evaluated_by_two
python - $runs <<'PYTHON'
import json, sys
from pathlib import Path
runs = Path(sys.argv[1])
losses = [[json.loads(line)["loss"] for line in open(runs / name / "metrics.jsonl")] for name in ("one_rank", "two_ranks")]
for step, (one, two) in enumerate(zip(*losses, strict=True), start=1):
    print(f"step {step}: loss {one:.7f} on one rank, {two:.7f} on two")
one, two = (json.loads(next((runs / name / "evaluation").glob("step_3*.json")).read_text()) for name in ("one_rank", "evaluated_by_two"))
furthest = max(abs(a["loss"] - b["loss"]) for a, b in zip(one["by_position"], two["by_position"], strict=True))
print(f"validation: loss {one['loss']:.7f} by one rank, {two['loss']:.7f} by two; by position at most {furthest:.1e} apart")
PYTHON
