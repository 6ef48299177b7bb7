"""RESTARTS of launch/local.sh: a rank is killed, torchrun starts all of them again, and the losses stay the same."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from distributed import run_ranks
from small_run import numbers_of, read_metrics, small_config, train_here

from moba_megatron.platform.processes import die_with_parent

ROOT = Path(__file__).parents[2]


def rank_one(config: Path) -> psutil.Process:
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if str(config) in command and "train.py" in command and process.environ().get("RANK") == "1":
            return process
    raise AssertionError("no rank 1")


@pytest.mark.slow
def test_ranks_start_again_after_one_was_killed(tmp_path):
    changes = {"training__steps": 40, "checkpoint__every": 1, "checkpoint__asynchronous": False}
    whole, cut = (small_config(tmp_path / name, **changes) for name in ("whole", "cut"))
    assert run_ranks(2, train_here, whole, 2) == [("finished", 40)] * 2
    path, run = tmp_path / "cut.yaml", Path(cut.run.dir)
    path.write_text(cut.to_yaml())
    environment = {**os.environ, "RESTARTS": "1", "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(
            [ROOT / "launch/local.sh", "2", path],
            stdout=log, stderr=log, env=environment, preexec_fn=die_with_parent,
        )  # fmt: skip
        deadline = time.monotonic() + 200
        while not (run / "metrics.jsonl").exists() or len(read_metrics(run)) < 3:
            assert launcher.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)
        rank_one(path).send_signal(signal.SIGKILL)
        assert launcher.wait(timeout=250) == 0, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert "2 ranks, RESTARTS=1, CUDA_DEVICE_MAX_CONNECTIONS=1" in said and "resuming from" in said
    assert numbers_of(read_metrics(run)) == numbers_of(read_metrics(Path(whole.run.dir)))
