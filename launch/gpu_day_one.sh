#!/usr/bin/env bash
# What holds on this machine's GPU and what does not, in about ten minutes: launch/gpu_day_one.sh [FOLDER]
# Runs tests/gpu, times MoBA beside full attention (and FlashMoBA, where it is installed), and trains a model of 50M parameters in
# bf16, which saves and goes on. One page at the end; logs, tables and the run stay in FOLDER (runs/gpu_day_one).
#   DRY=1    from the environment: the same on a CPU, small, to see that the script itself runs
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
out=${1:-runs/gpu_day_one}
# A container may have what is needed in its own Python.
if [ -d "${VENV:-.venv}/bin" ]; then PATH=$(cd "${VENV:-.venv}/bin" && pwd):$PATH; fi
export COLUMNS=150 PATH PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
moba=(python -m moba_megatron)
python -c 'import torch' || { echo "error: no Python with PyTorch: make setup, or name its environment by VENV" >&2; exit 2; }
if [ -e "$out" ]; then echo "error: $out is there already: name another folder" >&2; exit 2; fi
if [ -n "${DRY:-}" ]; then
    export CUDA_VISIBLE_DEVICES=
    tests=(tests/gpu -m 'not gpu') bench=(--device cpu --lengths 2K --blocks 64:4 --dtypes fp32 --runs 1) steps=6
    model=(training.precision=fp32) device=cpu length=1K workers=2
else
    python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "error: PyTorch sees no GPU" >&2; exit 2; }
    tests=(tests/gpu -m gpu) steps=200 device=cuda length=8K workers=4
    bench=(--device cuda --lengths 32K,128K --blocks 64:16,128:8,512:3,4096:12 --dtypes bf16 --heads 32 --groups 8 --head-size 128
           --full torch_flash,cudnn,flash_attn,flash_attn_3,flash_attn_4 --runs 3)
    model=(training.precision=bf16 model.num_layers=12 model.hidden_size=640 model.num_attention_heads=10 model.num_query_groups=2
           model.ffn_hidden_size=1728 attention.block_size=512 attention.top_k=3 data.sequence_length=8192)
fi
mkdir -p "$out" && page=$out/page.txt

# part NAME SECONDS PATTERN COMMAND...: run it, and say on the page how it ended, with the lines of its output that match.
part() {
    local name=$1 seconds=$2 pattern=$3 code=0 start=$SECONDS
    shift 3
    echo "== $name: $*" | tee "$out/$name.log" >&2
    timeout --kill-after=10 "$seconds" "$@" >>"$out/$name.log" 2>&1 || code=$?
    # pytest ends with 0 as well where every test was skipped.
    if [ "$name" = tests ] && ! grep -qE '[1-9][0-9]* passed' "$out/$name.log"; then code=1; fi
    case $code in 0) ended=holds ;; 124 | 137) ended="STOPPED after $seconds s" ;; *) ended="FAILS ($code)" ;; esac
    [ "$code" = 0 ] || { failed=1 pattern="$pattern|rror"; }
    { echo "$name: $ended, $((SECONDS - start)) s"; grep -E "$pattern" "$out/$name.log" | cut -c1-150 | tail -n 16 | sed 's/^/    /'; } >>"$page" || true
}

failed=0
part machine 30 '│ (torch|triton|megatron-core|GPUs|transformer_engine|apex|flash_attn_?[34]?|auto) ' "${moba[@]}" doctor
part tests 240 'passed|failed|skipped|^(FAILED|ERROR)' python -m pytest "${tests[@]}" -o addopts= -q -n "$workers" --dist loadgroup
part operator 150 '[0-9] +│|no speed' "${moba[@]}" bench "${bench[@]}" --output "$out/operator"
part exchanges 40 '[0-9] +│|left out' "${moba[@]}" bench --context-parallel 1 --device "$device" --lengths "$length" --blocks 128:8 --runs 1 --output "$out/exchanges"
if python -c 'import megatron.core' 2>/dev/null; then
    corpus=data/prepared/python_stdlib
    part corpus 60 'tokens|error' "${moba[@]}" prepare data/python_stdlib.yaml "$corpus"
    train=(python train.py configs/quickstart/moba.yaml run.dir="$out/run" "${model[@]}" checkpoint.every=$((steps / 2))
           evaluation.samples=2 optimizer.warmup_steps=$((steps / 4)) logging.every=$((steps / 4)))
    part training 90 '^step|error|tokens/s|^layers' "${train[@]}" training.steps="$steps" training.stop_after="$((steps / 2))"
    part resumed 60 '^step|error|continu' "${train[@]}" training.steps="$steps"
else
    echo "training: left out, megatron-core is not installed" >>"$page"
fi
cat "$page"
exit "$failed"
