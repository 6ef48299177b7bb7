"""Commands that train or evaluate wait briefly: OpenMP's settings stand in the environment before torch is imported."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moba_megatron.before_torch import silence_missing_libraries

ROOT = Path(__file__).parents[1]
# Runs what a file or a module runs as a program, prints what OpenMP would read, and ends where torch would be imported.
AT_TORCH = """
import os, runpy, sys

class AtTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("at torch:", os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, AtTorch())
program, *sys.argv = sys.argv[1:2] + sys.argv[1:]
if program.endswith(".py"):
    runpy.run_path(program, run_name="__main__")
else:
    runpy.run_module(program, run_name="__main__", alter_sys=True)
"""
TRAIN = (str(ROOT / "train.py"), str(ROOT / "configs/quickstart/moba.yaml"), "--dry-run")


def at_torch(tmp_path: Path, *program: str, launcher: tuple[str, ...] = (), **environment: str) -> list[str]:
    """GOMP_SPINCOUNT and OMP_WAIT_POLICY of each process of a program at its first import of torch."""
    script = tmp_path / "at_torch.py"
    script.write_text(AT_TORCH)
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, *launcher, str(script), *program]
    done = subprocess.run(
        command, env={**kept, **environment}, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    marked = [line.partition("at torch: ")[2] for line in done.stdout.splitlines() if "at torch: " in line]
    assert marked, done.stdout + done.stderr
    return marked


@pytest.mark.parametrize(
    "program",
    [
        TRAIN,
        *(("moba_megatron", *words.split()) for words in ("evaluate x", "generate x", "scaling run x", "bench")),
    ],
    ids=lambda program: program[1].split("/")[-1],
)
def test_commands_wait_briefly(tmp_path, program):
    assert at_torch(tmp_path, *program) == ["1000 None"]


def test_ranks_of_torchrun_wait_briefly(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert at_torch(tmp_path, *TRAIN, launcher=torchrun) == ["1000 None"] * 2


@pytest.mark.parametrize(
    ("environment", "want"),
    [({"GOMP_SPINCOUNT": "300000"}, "300000 None"), ({"OMP_WAIT_POLICY": "active"}, "None active")],
)
def test_what_the_user_says_is_kept(tmp_path, environment, want):
    for program in (TRAIN, ("moba_megatron", "evaluate", "x")):
        assert at_torch(tmp_path, *program, **environment) == [want]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("torch.utils.cpp_extension", "No CUDA runtime is found, using CUDA_HOME='/usr/local'"),
        ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED. GPTModel is only accepting critical bug fixes"),
        ("megatron.core.dist_checkpointing.strategies.torch", "MCore's async save is deprecated and will be removed"),
    ],
)
def test_what_nobody_can_act_on_is_not_logged(name, text):
    silence_missing_libraries()
    logger, seen = logging.getLogger(name), []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logger.addHandler(handler)
    try:
        logger.warning(text)
        logger.warning("the disk is full")
    finally:
        logger.removeHandler(handler)
    assert seen == ["the disk is full"]
