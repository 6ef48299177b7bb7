"""`moba-megatron evaluate` under torchrun: one voice, one message, and no rank that hangs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed import run_ranks
from small_run import small_config, train_here

from moba_megatron.platform.processes import die_with_parent

pytestmark = pytest.mark.once
ROOT = Path(__file__).parents[2]

FAILS_IN_ATTENTION = """
import os, runpy, sys

from moba_megatron.model.core_attention import MoBACoreAttention

attend, calls = MoBACoreAttention.forward, 0


def fail_in_the_9th_call(*args, **kwargs):
    global calls
    calls += 1
    if calls == 9 and os.environ["RANK"] == "1":
        {how}
    return attend(*args, **kwargs)


MoBACoreAttention.forward = fail_in_the_9th_call
sys.argv[0] = "moba-megatron"
runpy.run_module("moba_megatron", run_name="__main__")
"""


def launched(*arguments: object, ranks: int = 2, script: Path | None = None) -> tuple[int, str]:
    """Exit code and output of a command under torchrun."""
    program = [str(script)] if script else ["-m", "moba_megatron"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *program]
    result = subprocess.run(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        preexec_fn=die_with_parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    return result.returncode, result.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A hardly trained model."""
    config = small_config(tmp_path_factory.mktemp("trained"), training__steps=1, optimizer__warmup_steps=0)
    run_ranks(1, train_here, config)
    return Path(config.run.dir)


def test_a_run_that_is_missing_is_told_once(tmp_path):
    code, output = launched("evaluate", tmp_path / "missing")
    assert code != 0
    assert len(re.findall("^error: .*missing is neither a checkpoint nor a run folder", output, re.M)) == 1
    assert "Traceback" not in output.split("torch/distributed")[0]


@pytest.mark.slow
def test_rank_0_alone_speaks_and_writes(run, tmp_path):
    code, output = launched("evaluate", run, "--parallel", "context=2", "--attention", "moba", "--output", tmp_path)
    assert code == 0, output
    assert output.count("validation loss") == 1 and output.count("step_1.json") == 1
    assert re.search(r"^2 ranks: tensor 1 x pipeline 1 x context 2, 1 data-parallel; memory of a rank", output, re.M)
    trained = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    found = json.loads((tmp_path / "evaluation/step_1.json").read_text())
    assert found["loss"] == pytest.approx(trained[0]["loss"], rel=1e-5)
    assert len((tmp_path / "evaluations.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["raise ArithmeticError('went wrong')", "os.kill(os.getpid(), 9)"], ids=["raise", "die"]
)
def test_a_rank_that_fails_ends_the_others(run, tmp_path, how):
    script = tmp_path / "fails.py"
    script.write_text(FAILS_IN_ATTENTION.format(how=how))
    began = time.monotonic()
    code, output = launched("evaluate", run, "--parallel", "tensor=2", "--output", tmp_path, script=script)
    assert code != 0 and time.monotonic() - began < 120, output
    assert "another rank ended first" in output
    assert output.count("failed: Traceback") == ("raise" in how)


@pytest.mark.slow
def test_commands_of_one_process_refuse_several(run):
    for command in (["generate", run, "--prompt", "w2"], ["evaluate", run, "--lm-eval", "arc"]):
        code, output = launched(*command)
        assert code != 0 and len(re.findall("^error: .* needs one process, but 2 were started", output, re.M)) == 1, (
            output
        )
