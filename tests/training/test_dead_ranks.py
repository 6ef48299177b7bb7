"""A rank that dies takes the job down within seconds, its own words first; no rank hangs and no process stays."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from nodes import available_kind, started_on, two_nodes
from processes import TRAIN, processes_of, rank_of, start, wait_for_step, write_config
from small_run import small_config

from moba_megatron.config import Config
from moba_megatron.platform.processes import end_job, watch_for_failure

pytestmark = pytest.mark.once

SECONDS = 60

RAISE_IN_ATTENTION = """
import os, runpy, sys

from moba_megatron.model.core_attention import MoBACoreAttention

attend, calls = MoBACoreAttention.forward, 0


def fail_in_the_40th_call(*args, **kwargs):
    global calls
    calls += 1
    if calls == 40 and os.environ["RANK"] == "1":
        raise ArithmeticError("went wrong")
    return attend(*args, **kwargs)


MoBACoreAttention.forward = fail_in_the_40th_call
sys.argv[0] = {train!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def failed_output(process: subprocess.Popen[str], began: float) -> str:
    """The output of a launcher that fails in time."""
    output, _ = process.communicate(timeout=120)
    seconds = time.monotonic() - began
    print(f"ended after {seconds:.1f} s")
    assert process.returncode != 0 and seconds < SECONDS, output
    return output


def nothing_stays(config: Config) -> bool:
    deadline = time.monotonic() + 10
    while processes_of(config) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not processes_of(config)


def read_status(config: Config) -> dict[str, Any]:
    return json.loads((Path(config.run.dir) / "status.json").read_text())


def test_a_killed_rank(tmp_path):
    config = small_config(tmp_path, training__steps=4000)
    process = start(config, ranks=2)
    wait_for_step(config, 3, process)
    began = time.monotonic()
    rank_of(config, 1).kill()
    output = failed_output(process, began)
    assert nothing_stays(config)
    # The dead rank says nothing: its neighbour does in one line, and the launcher names the signal.
    (line,) = re.findall(r"^\[rank .*", output, re.M)
    assert line.startswith("[rank 0] another rank ended first and closed its connections to this one (RuntimeError: ")
    assert "exitcode  : -9" in output.split("Root Cause")[1]
    assert read_status(config)["state"] == "failed"


def test_a_rank_that_raises_while_the_other_waits_for_it(tmp_path):
    script = tmp_path / "raise_in_attention.py"
    script.write_text(RAISE_IN_ATTENTION.format(train=str(TRAIN)))
    # Tensor parallel: rank 0 waits for rank 1 in the all-reduce after this layer's projection.
    config = small_config(tmp_path, training__steps=4000, parallel__tensor=2)
    process = start(config, ranks=2, script=script)
    wait_for_step(config, 1, process)
    output = failed_output(process, time.monotonic())
    assert nothing_stays(config)
    first, second = re.findall(r"^\[rank .*", output, re.M)
    assert first == "[rank 1] failed: Traceback (most recent call last):"
    assert re.fullmatch(r"\[rank 0\] another rank ended first: rank 1 on .*: ArithmeticError: went wrong", second)
    own, after = output.split(second)
    assert own.count("Traceback") == 1 and own.endswith("ArithmeticError: went wrong\n\n")
    # The launcher, too, names the rank that was first.
    assert "rank      : 1 (local_rank: 1)" in after.split("Root Cause")[1]
    assert read_status(config)["error"] == "ArithmeticError: went wrong"


def test_a_mistake_on_every_rank_is_told_once(tmp_path):
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def fail(rank: int) -> None:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="3")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(server.port))
        sys.stderr = (tmp_path / str(rank)).open("w")
        watch_for_failure()
        end_job(ValueError("sizes do not fit"), "error: sizes do not fit", code=2)

    ranks = [multiprocessing.get_context("fork").Process(target=fail, args=(rank,)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    assert all(rank.exitcode in (1, 2) for rank in ranks)
    texts = [(tmp_path / str(rank)).read_text() for rank in range(3)]
    assert texts.count("error: sizes do not fit\n") == 1
    # The first rank of a machine may speak for those that had not found it by themselves yet.
    assert all(
        text == "" or "another rank ended first" in text and rank == 0
        for rank, text in enumerate(texts)
        if not text.startswith("error")
    )


@pytest.mark.parametrize(
    "wrong", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["on-the-head", "on-the-other-node"]
)
@pytest.mark.parametrize("kind", [available_kind()])
def test_a_file_that_is_missing_on_one_node(tmp_path, kind, wrong):
    config = small_config(tmp_path, training__steps=4000)
    overrides = [("data.train=nowhere/train",) if number == wrong else () for number in range(2)]
    with two_nodes(kind) as nodes, started_on(nodes, write_config(config), overrides) as agents:
        agents[wrong].wait(timeout=120)
        began = time.monotonic()
        outputs = [failed_output(agent, began) for agent in agents]
    assert nothing_stays(config)
    assert "error: the configuration cannot be used:\n  - data.train = nowhere/train: missing" in outputs[wrong]
    # The other rank waits for a process group that never comes.
    (line,) = re.findall(r"^\[rank .*", outputs[1 - wrong], re.M)
    assert re.fullmatch(r"\[rank \d\] another rank ended first: rank \d on .*: ConfigError: .*nowhere/train.*", line)
    assert not Path(config.run.dir).exists()
