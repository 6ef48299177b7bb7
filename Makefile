# Two commands: `make quickstart` trains a small model on real text, `make test` proves that the project is right.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TOKENIZERS_PARALLELISM := false

CORPUS := data/prepared/python_stdlib
RUN := runs/quickstart

.PHONY: setup quickstart test test-slow kernels bench clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,wandb,test]'
	touch $@

quickstart: setup
	$(BIN)/moba-megatron prepare data/python_stdlib.yaml $(CORPUS)
	$(BIN)/python train.py configs/quickstart/moba.yaml run.dir=$(RUN)
	$(BIN)/moba-megatron generate $(RUN) --prompt "def " --tokens 64
	$(BIN)/moba-megatron evaluate $(RUN)

test: setup
	$(BIN)/ruff check .
	$(BIN)/pytest

test-slow: setup
	TRITON_INTERPRET=1 $(BIN)/pytest -m 'slow and not gpu' tests/ops/triton/interpreted_*.py
	$(BIN)/pytest -m 'slow and not gpu'

# Compiles all GPU kernels for A100, H100 and B200, without a GPU; fails where one spills or does not fit.
kernels: setup
	$(BIN)/python -m moba_megatron.ops.triton.compiled --output bench/kernels.csv

bench: setup
	$(BIN)/moba-megatron bench --preset targets --output bench

clean:
	rm -rf $(VENV) runs bench data/prepared
