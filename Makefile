# Two commands: `make quickstart` trains a small model on real text, `make test` proves that the project is right.
#
# PYTHON=python3.12 takes another Python. The environment is .venv; where that has another Python than the one asked for,
# it is .venv-3.12, or what VENV says. One that is there is used as it is.
version = $(shell "$(1)" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
ifneq ($(filter command environment,$(firstword $(origin PYTHON))),)
asked := $(call version,$(PYTHON))
ifeq ($(asked),)
$(error PYTHON = '$(PYTHON)' does not start: give the path of a Python)
endif
VENV ?= $(if $(wildcard .venv/bin/python),$(if $(filter $(asked),$(call version,.venv/bin/python)),.venv,.venv-$(asked)),.venv)
else
PYTHON := python3
VENV ?= .venv
endif
BIN := $(VENV)/bin
ifneq ($(asked),)
ifneq ($(wildcard $(BIN)/python),)
ifneq ($(asked),$(call version,$(BIN)/python))
$(error VENV = $(VENV) has Python $(call version,$(BIN)/python), PYTHON = '$(PYTHON)' is $(asked): name another VENV, or leave one out)
endif
endif
endif
# Scripts of launch/ look there as well.
export VENV
export TOKENIZERS_PARALLELISM := false

CORPUS := data/prepared/python_stdlib
RUN := runs/quickstart

# Where megatron-core is met; nothing of it runs in Triton's interpreter.
MEGATRON_TESTS := $(addprefix tests/,platform model parallel checkpoint training convert other_scripts)

# Files of tests at the same time; many tests start processes of their own. WORKERS=1 runs one after the other.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$((n < 8 ? n : 8)))
AT_ONCE := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: setup quickstart test test-megatron test-te test-matrix test-slow test-faults kernels bench clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,wandb,test]'
	touch $@

quickstart: setup
	$(BIN)/moba-megatron prepare data/python_stdlib.yaml $(CORPUS)
	$(BIN)/python train.py configs/quickstart/moba.yaml run.dir=$(RUN)
	$(BIN)/moba-megatron generate $(RUN) --prompt "def " --tokens 64
	$(BIN)/moba-megatron evaluate $(RUN)

test: setup
	$(BIN)/ruff check .
	$(BIN)/pytest $(AT_ONCE)

# For a second Python, beside one that ran all of `make test`.
test-megatron: setup
	$(BIN)/pytest $(AT_ONCE) -m 'not gpu and not slow and not once' $(MEGATRON_TESTS)

# Our models in Transformer Engine's layers, without a GPU: Python 3.12, and 1 GB more.
test-te:
	tests/te.sh

# Every supported release of megatron-core and Python, one after the other: hours.
test-matrix:
	tests/matrix.sh

test-slow: setup
	TRITON_INTERPRET=1 $(BIN)/pytest -m 'not gpu' --memory-accesses tests/ops/triton/interpreted_*.py
	$(BIN)/pytest -m 'slow and not gpu'

# Kills trainings at every layout, and all else that leaves files, 200 times at random moments: under an hour on two cores.
# KILLS and SEED change that.
KILLS ?= 200
SEED ?= 0
test-faults: setup
	MOBA_FUZZ_SECONDS=20 $(BIN)/pytest tests/faults/test_readers.py
	$(BIN)/python tests/faults/kill_loop.py --kills $(KILLS) --seed $(SEED)

# Compiles all GPU kernels for A100, H100 and B200, without a GPU; fails where one spills or does not fit.
kernels: setup
	$(BIN)/python -m moba_megatron.ops.triton.compiled --output bench/kernels.csv

bench: setup
	$(BIN)/moba-megatron bench --preset targets --output bench

clean:
	rm -rf .venv .venv-* runs bench data/prepared
