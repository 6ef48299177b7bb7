#!/usr/bin/env bash
# Our models in Transformer Engine's layers, without a GPU: its own Python, a stand-in for its compiled part, and both ends
# of the range of megatron-core. A folder of its own lies over the environment of Python 3.12: tests/te.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/pythons.sh
python=$(python_of 3.12)
VENV=.venv-3.12 make setup PYTHON="$python"
below=$PWD/.venv-3.12 over=$PWD/.venv-te
versions="transformer-engine 2.20.2, megatron-core 0.16.1"
if [ "$(cat "$over/.installed" 2>/dev/null)" != "$versions" ]; then
    "$python" -m venv --clear "$over"
    packages=lib/python3.12/site-packages
    echo "$below/$packages" >"$over/$packages/below.pth"
    ln -s "$below/$packages/nvidia" "$over/$packages/nvidia"    # where it looks for CUDA's libraries, and nowhere else
    install() { "$over/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
    # Without what it requires: its compiled part for PyTorch wants a compiler, and half an hour.
    install --no-deps transformer-engine==2.20.2 transformer-engine-cu13==2.20.2
    install --constraint constraints.txt einops onnx onnxscript onnx_ir nvdlfw-inspect nvidia-cudnn-frontend pydantic protobuf ml_dtypes
    install --no-deps --target "$over/megatron-core-0.16.1" megatron-core==0.16.1
    echo "$versions" >"$over/.installed"
fi
for folder in "" "$over/megatron-core-0.16.1"; do
    PYTHONPATH=tests/te_layers:$folder "$over/bin/python" -m pytest -p stand_in -m '' tests/te_layers "$@"
done
