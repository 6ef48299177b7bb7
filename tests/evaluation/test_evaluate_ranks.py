"""`moba-megatron evaluate` on several ranks: the files of one rank, at every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks
from megatron.core import parallel_state
from small_run import small_config, train_here
from typer.testing import CliRunner

from moba_megatron.cli import app
from moba_megatron.evaluation.evaluate_command import evaluate_command
from moba_megatron.evaluation.losses.evaluate_losses import evaluate_losses

# Imported here once: each command runs in processes that are forked from this one.
COMMANDS = (evaluate_command, evaluate_losses)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """MoBA with 3 of 8 blocks in 3 of 4 layers, on packs of documents; an odd vocabulary."""
    config = small_config(tmp_path_factory.mktemp("trained"), model__init_method_std=0.3, training__steps=4)
    run_ranks(1, train_here, config)
    return Path(config.run.dir)


def _called(cases: list[list[str]]) -> list[tuple[int, str]]:
    """Exit code and output of one command after the other, on this rank."""
    found = []
    for arguments in cases:
        result = CliRunner().invoke(app, ["evaluate", *arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        found.append((result.exit_code, result.output))
        if parallel_state.is_initialized():
            parallel_state.destroy_model_parallel()
    return found


def on_ranks(ranks: int, cases: list[list[Any]], code: int = 0) -> list[str]:
    """What rank 0 prints of each command; what the others say are warnings of libraries."""
    first, *others = run_ranks(ranks, _called, [[str(part) for part in case] for case in cases])
    assert [found for found, _ in first] == [code] * len(cases), first
    if code == 0:
        assert not any(".json" in output for outputs in others for _, output in outputs)
    return [output for _, output in first]


def records(folder: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in sorted((folder / "evaluation").glob("*.json"))}


def same(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Everything equal, numbers up to a tolerance."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            same(found[key], value, tolerance)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            same(*pair, tolerance)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)
    else:
        assert found == expected


LOSSES = ["--attention", "moba", "--samples", 3, "--losses-choice", "8:3@1-2"]
# By number of ranks; what the sizes leave over is data parallel.
LAYOUTS = [
    pytest.param(2, ["tensor=2,sequence=true", "pipeline=2", "context=2", ""], id="two"),
    pytest.param(2, ["tensor=2", "context=2,exchange=p2p"], id="other-two", marks=pytest.mark.slow),
    pytest.param(3, ["pipeline=3", "context=3", ""], id="three", marks=pytest.mark.slow),
    pytest.param(4, ["context=2", "tensor=2,context=2", "pipeline=2,context=2"], id="four", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def losses_of_one(run, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("one")
    on_ranks(1, [[run, *LOSSES, "--output", folder]])
    return records(folder)


@pytest.mark.parametrize(("ranks", "layouts"), LAYOUTS)
def test_losses_are_those_of_one_rank(run, tmp_path, losses_of_one, ranks, layouts):
    """Also where the data-parallel ranks do not divide the samples."""
    cases = [[run, *LOSSES, "--parallel", sizes, "--output", tmp_path / (sizes or "data")] for sizes in layouts]
    outputs = on_ranks(ranks, cases)
    assert set(losses_of_one) == {"step_4.json", "step_4_B8_K3_in_layers_1-2.json"}
    for case, output in zip(cases, outputs, strict=True):
        found = records(case[-1])
        for record in [*losses_of_one.values(), *found.values()]:
            record.pop("power_law", None)  # a fit of many steps
        same(found, losses_of_one)
        assert "validation loss" in output and (case[-1] / "plots/loss_by_position_step_4.png").is_file()
        assert len((case[-1] / "evaluations.jsonl").read_text().splitlines()) == 2
