"""Two nodes train as one does: two launchers, one rendezvous, a network between them."""

from pathlib import Path

import pytest
from distributed import run_ranks
from nodes import available_kind, started_on, two_nodes
from processes import finish, write_config
from small_run import numbers_of, read_metrics, small_config, train_here


@pytest.mark.parametrize("parallel", [{}, {"context": 2, "exchange": "p2p"}], ids=["dp2", "cp2-ring"])
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
