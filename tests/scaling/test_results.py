"""Which runs of a sweep count as finished, by what their folders hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sweep_examples import write_sweep

from moba_megatron.scaling.results import Result, best, read_results
from moba_megatron.scaling.sweep import load_sweep


def finished(folder: Path, **last: Any) -> list[Result]:
    """The results of a sweep of four runs whose first has this last evaluation."""
    sweep = load_sweep(write_sweep(folder))
    for number, point in enumerate(sweep.points):
        steps, run = point.config.training.steps, point.run
        run.path.mkdir(parents=True, exist_ok=True)
        run.status.write_text(json.dumps({"state": "finished", "step": steps}) + "\n")
        run.metrics.write_text(json.dumps({"step": steps, "step_seconds": 1.0}) + "\n")
        good = {"step": steps, "loss": 3.0 + number, "trailing_loss": 2.5, "by_position": []}
        line = {key: value for key, value in {**good, **(last if number == 0 else {})}.items() if value is not ...}
        run.evaluations.write_text(json.dumps(line) + "\n")
    return read_results(sweep)


def test_numbers_are_results(tmp_path: Path):
    assert [result.state for result in finished(tmp_path)] == ["finished"] * 4
    assert finished(tmp_path, trailing_loss=None)[0].state == "finished", "no document fills the window"


@pytest.mark.parametrize(
    ("last", "why"),
    [
        ({"loss": float("nan")}, "its loss is nan"),
        ({"loss": float("inf")}, "its loss is inf"),
        ({"loss": None}, "its loss is None"),
        ({"loss": "3.0"}, "its loss is 3.0"),
        ({"trailing_loss": float("nan")}, "its trailing_loss is nan"),
        ({"by_position": ...}, "has no by_position"),
    ],
    ids=str,
)
def test_what_is_no_number_is_no_result(tmp_path: Path, last: dict[str, Any], why: str):
    results = finished(tmp_path, **last)
    assert results[0].state == "failed" and why in results[0].why and results[0].loss is None
    assert [result.state for result in results[1:]] == ["finished"] * 3
    assert best(results, ["size", "attention"])[0].loss == 4.0


def test_a_damaged_record_is_named(tmp_path: Path):
    sweep = load_sweep(write_sweep(tmp_path))
    finished(tmp_path)
    sweep.points[0].run.metrics.write_text('{"step": 8, "step_seconds": 1.0}\n{"st\n{"step": 8}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is damaged"):
        read_results(sweep)
