#!/usr/bin/env bash
# What holds on this machine's GPU and what does not, in ten minutes: launch/gpu_day_one.sh [FOLDER]
# Runs tests/gpu, times MoBA beside full attention (and FlashMoBA, where it is installed), and trains a model of 50M parameters in
# bf16 until it has saved twice and gone on. One page at the end; logs, tables and the run stay in FOLDER (runs/gpu_day_one).
#   DRY=1    from the environment: the same on a CPU, small, to see that the script itself runs
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
out=${1:-runs/gpu_day_one}
export COLUMNS=150 PATH="$(cd "${VENV:-.venv}/bin" 2>/dev/null && pwd):$PATH" PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ -e "$out" ]; then echo "error: $out is there already: name another folder" >&2; exit 2; fi
if [ -n "${DRY:-}" ]; then
    export CUDA_VISIBLE_DEVICES=
    tests=(tests/gpu -m 'not gpu') bench=(--device cpu --lengths 2K --blocks 64:4 --dtypes fp32 --runs 1) steps=6
    model=(training.precision=fp32) device=cpu length=1K
else
    python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { echo "error: PyTorch sees no GPU" >&2; exit 2; }
    tests=(tests/gpu -m gpu) steps=200 device=cuda length=8K
    bench=(--device cuda --lengths 32K,128K --blocks 64:16,128:8,512:3,4096:12 --dtypes bf16 --heads 32 --groups 8 --head-size 128
           --full torch_flash,cudnn,flash_attn,flash_attn_3,flash_attn_4 --runs 3)
    model=(training.precision=bf16 model.num_layers=12 model.hidden_size=512 model.num_attention_heads=8 model.num_query_groups=2
           model.ffn_hidden_size=1408 attention.block_size=512 attention.top_k=3 data.sequence_length=8192)
fi
mkdir -p "$out"
page=$out/page.txt

# part NAME SECONDS PATTERN COMMAND...: run it, and say on the page how it ended, with the lines of its output that match.
part() {
    local name=$1 seconds=$2 pattern=$3 code=0 start=$SECONDS
    shift 3
    echo "== $name: $*" >&2
    timeout --kill-after=10 "$seconds" "$@" >"$out/$name.log" 2>&1 || code=$?
    case $code in 0) ended=holds ;; 124 | 137) ended="STOPPED after $seconds s" ;; *) ended="FAILS ($code)" ;; esac
    { echo "$name: $ended, $((SECONDS - start)) s"; grep -E "$pattern" "$out/$name.log" | cut -c1-150 | tail -n 16 | sed 's/^/    /'; } >>"$page" || true
    [ "$code" = 0 ] || failed=1
}

failed=0
part machine 60 '│ (torch|triton|megatron-core|GPUs|transformer_engine|apex|flash_attn_?[34]?|auto) ' moba-megatron doctor
part tests 270 'passed|failed|^(FAILED|ERROR)' python -m pytest "${tests[@]}" -o addopts= -q -n "$(nproc | awk '{print $1 < 4 ? $1 : 4}')"
part operator 150 '[0-9] +│' moba-megatron bench "${bench[@]}" --output "$out/operator"
part exchanges 60 '[0-9] +│|left out' moba-megatron bench --context-parallel 1 --device "$device" --lengths "$length" --blocks 128:8 --runs 1 --output "$out/exchanges"
if python -c 'import megatron.core' 2>/dev/null; then
    corpus=data/prepared/python_stdlib
    part corpus 90 'tokens|error' moba-megatron prepare data/python_stdlib.yaml "$corpus"
    train=(python train.py configs/quickstart/moba.yaml run.dir="$out/run" "${model[@]}" checkpoint.every=$((steps / 2))
           evaluation.samples=2 optimizer.warmup_steps=$((steps / 4)) logging.every=$((steps / 4)))
    part training 120 '^step|error|tokens/s|^layers' "${train[@]}" training.steps="$steps" training.stop_after="$((steps / 2))"
    part resumed 120 '^step|error|continu' "${train[@]}" training.steps="$steps"
else
    echo "training: left out, megatron-core is not installed" >>"$page"
fi
cat "$page"
exit "$failed"
