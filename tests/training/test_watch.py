"""A run that does not get on says who keeps it waiting: a rank that is stopped, one that is stuck, this process
itself."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from processes import TRAIN, finish, rank_of, start, wait_for_step
from small_run import small_config

from moba_megatron.config import Config
from moba_megatron.training.watch import _Seen, findings

pytestmark = pytest.mark.once

STUCK_IN_ATTENTION = """
import os, runpy, sys, time

from moba_megatron.model.core_attention import MoBACoreAttention

attend, calls = MoBACoreAttention.forward, 0


def wait_for_the_disk():
    time.sleep(5)


def stick_in_the_40th_call(*args, **kwargs):
    global calls
    calls += 1
    if calls == 40 and os.environ["RANK"] == "1":
        wait_for_the_disk()
    return attend(*args, **kwargs)


MoBACoreAttention.forward = stick_in_the_40th_call
sys.argv[0] = {train!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def status_when(config: Config, wanted: bool) -> dict[str, Any]:
    """The status, once it says that the run is stalled, or no longer."""
    path, deadline = Path(config.run.dir) / "status.json", time.monotonic() + 60
    while True:
        status = json.loads(path.read_text())
        if ("stalled" in status) is wanted:
            return status
        assert time.monotonic() < deadline, status
        time.sleep(0.1)


def test_ranks_that_are_stuck_or_stopped_are_named(tmp_path):
    script = tmp_path / "stuck.py"
    script.write_text(STUCK_IN_ATTENTION.format(train=str(TRAIN)))
    config = small_config(tmp_path, training__steps=4000, run__stall_seconds=2.0)
    process = start(config, ranks=2, script=script)
    wait_for_step(config, 1, process)

    (stuck,) = status_when(config, True)["stalled"]["ranks"]
    assert stuck["rank"] == 1 and stuck["frames"][0].startswith("wait_for_the_disk (stuck.py:")
    status_when(config, False)

    first, other = (rank_of(config, rank, script) for rank in range(2))
    other.send_signal(signal.SIGSTOP)
    status = status_when(config, True)
    (stopped,) = status["stalled"]["ranks"]
    assert status["state"] == "running" and stopped["rank"] == 1 and stopped["silent"] >= 2
    other.send_signal(signal.SIGCONT)
    status_when(config, False)

    # Rank 0 is the one that writes; the other can only speak.
    first.send_signal(signal.SIGSTOP)
    time.sleep(6)
    first.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert json.loads((Path(config.run.dir) / "status.json").read_text())["state"] == "stopped"
    assert re.search(r"\[rank 0\] no progress for \d+ s in step \d+ \(run.stall_seconds = 2\)\n  rank 1 on ", output)
    assert re.search(r"rank 1 on \S+ gives no sign of life for \d+ s: stopped, or its machine is gone", output)
    assert re.search(r"1 others wait: .*distributed_c10d.py", output) and "[rank 0] the run goes on" in output
    assert re.search(r"\[rank 1\] no progress .*\n  rank 0 on \S+ gives no sign of life for", output)
    assert re.search(r"\[rank [01]\] this process itself was stopped, or its machine slept, for \d+ s", output)


def test_a_process_alone_says_that_it_was_stopped(tmp_path):
    config = small_config(tmp_path, training__steps=4000, run__stall_seconds=1.0)
    # Under nohup these tests, and what they start, would ignore SIGHUP.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        process = start(config)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for_step(config, 3, process)
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    time.sleep(1)
    process.send_signal(signal.SIGHUP)
    assert re.search(r"\[rank 0\] this process itself was stopped, or its machine slept, for [34] s", finish(process))
    status = json.loads((Path(config.run.dir) / "status.json").read_text())
    assert (status["state"], status["signal"]) == ("stopped", "SIGHUP")


def test_silent_ranks_come_first_and_those_that_only_wait_are_counted():
    def seen(frames: list[str]) -> _Seen:
        return _Seen({"host": "a", "doing": "step 7", "frames": frames}, time.monotonic())

    waits = ["wait (distributed_c10d.py:1)"]
    lines, ranks = findings([seen(waits), seen(["read (files.py:2)"]), seen([])], [False, False, True], True)
    assert [entry["rank"] for entry in ranks] == [2, 1]
    assert lines == [
        "rank 2 on a gives no sign of life for 0 s: stopped, or its machine is gone",
        "rank 1 on a is in step 7: read (files.py:2)",
        "1 others wait: wait (distributed_c10d.py:1)",
    ]
    lines, ranks = findings([seen(waits), seen(waits)], [False, False], False)
    assert lines[0].startswith("the store of the job does not answer") and len(ranks) == 2
