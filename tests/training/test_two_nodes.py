"""Two nodes train as one does: two launchers, one rendezvous, a network between them."""

import signal
import time
from pathlib import Path

import psutil
import pytest
from distributed import run_ranks
from nodes import available_kind, started_on, two_nodes
from processes import finish, write_config
from small_run import numbers_of, read_metrics, small_config, train_here

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    "parallel",
    [pytest.param({}, marks=pytest.mark.slow), {"context": 2, "exchange": "p2p"}],
    ids=["dp2", "cp2-ring"],
)
@pytest.mark.parametrize("kind", [available_kind()])
def test_two_nodes_give_the_numbers_of_one(tmp_path, kind, parallel):
    changes = {f"parallel__{name}": value for name, value in parallel.items()}
    one = small_config(tmp_path / "one", **changes)
    two = small_config(tmp_path / "two", **changes)
    assert run_ranks(2, train_here, one, 2) == [("finished", one.training.steps)] * 2
    with two_nodes(kind) as nodes, started_on(nodes, write_config(two)) as agents:
        outputs = [finish(agent) for agent in agents]
    assert any("2 processes" in output for output in outputs)
    # The same ranks add the same numbers in the same order, whatever carries them: equal to the last bit.
    assert numbers_of(read_metrics(Path(two.run.dir))) == numbers_of(read_metrics(Path(one.run.dir)))


@pytest.mark.slow
def test_ranks_of_two_nodes_start_again_after_one_was_killed(tmp_path, monkeypatch):
    """RESTARTS of launch/multi_node.sh: both launchers start their ranks again, and the losses stay the same."""
    monkeypatch.setenv("RESTARTS", "1")
    changes = {"training__steps": 60, "checkpoint__every": 1, "checkpoint__asynchronous": False}
    one, two = (small_config(tmp_path / name, **changes) for name in ("one", "two"))
    assert run_ranks(2, train_here, one, 2) == [("finished", 60)] * 2
    path, run = write_config(two), Path(two.run.dir)
    with two_nodes(available_kind()) as nodes, started_on(nodes, path) as agents:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() or len(read_metrics(run)) < 3:
            assert all(agent.poll() is None for agent in agents) and time.monotonic() < deadline
            time.sleep(0.02)
        (victim,) = [
            process
            for process in psutil.process_iter(["cmdline"])
            if {str(path), "train.py"} <= set(process.info["cmdline"] or []) and process.environ().get("RANK") == "1"
        ]
        victim.send_signal(signal.SIGKILL)
        outputs = [finish(agent) for agent in agents]
    assert any("resuming from" in output for output in outputs)
    assert numbers_of(read_metrics(run)) == numbers_of(read_metrics(Path(one.run.dir)))
