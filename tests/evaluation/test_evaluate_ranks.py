"""`moba-megatron evaluate` on several ranks: the files of one rank, at every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributed import run_ranks
from megatron.core import parallel_state
from small_run import small_config, train_here
from typer.testing import CliRunner

from moba_megatron.checkpoint.find import find_checkpoint
from moba_megatron.cli import app
from moba_megatron.config import ParallelConfig
from moba_megatron.convert.run_inputs import found_config
from moba_megatron.corpus.prepare import prepare
from moba_megatron.corpus.recipe import load_recipe
from moba_megatron.evaluation.evaluate_command import evaluate_command
from moba_megatron.evaluation.layout import evaluation_layout
from moba_megatron.evaluation.losses.evaluate_losses import evaluate_losses
from moba_megatron.evaluation.routing.evaluate_routing import evaluate_routing
from moba_megatron.evaluation.tasks.corpus import write_corpus
from moba_megatron.evaluation.tasks.evaluate_tasks import evaluate_tasks

# Imported here once: each command runs in processes that are forked from this one.
COMMANDS = (evaluate_command, evaluate_losses, evaluate_routing, evaluate_tasks)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """MoBA with 3 of 8 blocks in 3 of 4 layers, on packs of documents; an odd vocabulary. The key heads of the second
    have a K of their own."""
    own = {2: {"top_k": [2, 4]}}
    folder = tmp_path_factory.mktemp("trained")
    config = small_config(folder, model__init_method_std=0.3, training__steps=4, attention__layers=own)
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
    found = {path.name: json.loads(path.read_text()) for path in sorted((folder / "evaluation").glob("*.json"))}
    suggested = (folder / "evaluation").glob("*_budget_*.yaml")
    return {**found, **{path.name: yaml.safe_load(path.read_text()) for path in suggested}}


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


ASKED = ["--attention", "moba", "--samples", 3, "--losses-choice", "8:3@1-2", "--routing", "--routing-samples", 3]
ASKED += ["--suggest-budget", 0.6]
# By number of ranks; what the sizes leave over is data parallel.
LAYOUTS = [
    pytest.param(2, ["tensor=2,sequence=true", "pipeline=2", "context=2", ""], id="two"),
    pytest.param(2, ["tensor=2", "context=2,exchange=p2p"], id="other-two", marks=pytest.mark.slow),
    pytest.param(3, ["pipeline=3", "context=3", ""], id="three", marks=pytest.mark.slow),
    pytest.param(4, ["context=2", "tensor=2,context=2", "pipeline=2,context=2"], id="four", marks=pytest.mark.slow),
    pytest.param(4, ["tensor=2,pipeline=2"], id="four-weights", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def seen_by_one(run, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("one")
    on_ranks(1, [[run, *ASKED, "--output", folder]])
    return records(folder)


@pytest.mark.parametrize(("ranks", "layouts"), LAYOUTS)
def test_losses_and_routing_are_those_of_one_rank(run, tmp_path, seen_by_one, ranks, layouts):
    """Also where the data-parallel ranks do not divide the samples."""
    cases = [[run, *ASKED, "--parallel", sizes, "--output", tmp_path / (sizes or "data")] for sizes in layouts]
    outputs = on_ranks(ranks, cases)
    budgets = "routing_step_4_moba_budget_0.6.yaml"
    assert set(seen_by_one) == {"step_4.json", "step_4_B8_K3_in_layers_1-2.json", "routing_step_4_moba.json", budgets}
    assert set(seen_by_one[budgets]["attention"]["layers"]) == {1, 2, 3}
    assert [layer["layer"] for layer in seen_by_one["routing_step_4_moba.json"]["layers"]] == [1, 2, 3]
    for case, output in zip(cases, outputs, strict=True):
        found = records(case[-1])
        for record in [*seen_by_one.values(), *found.values()]:
            record.pop("power_law", None)  # a fit of many steps
        same(found, seen_by_one)
        assert "validation loss" in output and (case[-1] / "plots/loss_by_position_step_4.png").is_file()
        assert "layers 1, 3 (B=16 K=3): the chosen blocks hold" in output
        assert "layer 2 (B=16 K=2,4): the chosen blocks hold" in output
        assert len((case[-1] / "evaluations.jsonl").read_text().splitlines()) == 3


def task_run(folder: Path, **changes: Any) -> Path:
    """A model of tasks, hardly trained; its validation data are what it was trained on."""
    write_corpus(folder / "samples", ["needle"], [64], tokens=8000, seed=1)
    prepare(load_recipe(folder / "samples/recipe.yaml"), folder / "data", workers=1)
    config = small_config(
        folder,
        data__train=str(folder / "data/train"),
        data__validation=str(folder / "data/train"),
        data__tokenizer=str(folder / "data/tokenizer"),
        data__packing="best_fit",
        training__steps=1,
        optimizer__warmup_steps=0,
        model__init_method_std=0.3,
        **changes,
    )
    run_ranks(1, train_here, config)
    return Path(config.run.dir)


@pytest.fixture(scope="module")
def asked_run(tmp_path_factory) -> Path:
    return task_run(tmp_path_factory.mktemp("tasks"))


TASKS = ["--tasks", "needle", "--lengths", "61,128", "--depths", "0.5", "--task-samples", 3, "--attention", "moba"]


@pytest.fixture(scope="module")
def tasks_of_one(asked_run, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tasks_one")
    on_ranks(1, [[asked_run, *TASKS, "--output", folder]])
    return records(folder)


QUICK = pytest.param(2, ["tensor=2,sequence=true", "context=2"], id="two-quick")
REST = pytest.param(2, ["pipeline=2", ""], id="two-rest", marks=pytest.mark.slow)


@pytest.mark.parametrize(("ranks", "layouts"), [QUICK, REST, *LAYOUTS[1:]])
def test_tasks_are_those_of_one_rank(asked_run, tmp_path, tasks_of_one, ranks, layouts):
    """Lengths that no layout divides; tokens and vocabulary of a row of logits on different ranks."""
    cases = [[asked_run, *TASKS, "--parallel", sizes, "--output", tmp_path / (sizes or "data")] for sizes in layouts]
    outputs = on_ranks(ranks, cases)
    (expected,) = tasks_of_one.values()
    assert len({cell["answer_nats"] for cell in expected["cells"]}) == 2
    for case, output in zip(cases, outputs, strict=True):
        same(records(case[-1]), tasks_of_one)
        assert "needle" in output and (case[-1] / "plots/tasks_needle_step_1.png").is_file()


@pytest.mark.slow
def test_a_mixture_is_evaluated_over_ranks_that_share_its_experts(tmp_path):
    """Also where they are data-parallel ranks, whose numbers of samples differ."""
    run = task_run(tmp_path, model__num_moe_experts=4, model__moe_ffn_hidden_size=16)
    asked = ["--losses", "--samples", 3, "--routing", "--routing-samples", 3, *TASKS]
    layouts = ["expert=2", "tensor=2,expert=2", "context=2,expert=2"]
    cases = [[run, *asked, "--parallel", sizes, "--output", tmp_path / sizes] for sizes in layouts]
    on_ranks(1, [[run, *asked, "--output", tmp_path / "one"]])
    on_ranks(2, cases)
    for case in cases:
        found, expected = records(case[-1]), records(tmp_path / "one")
        assert len(expected) == 3
        for record in [*found.values(), *expected.values()]:
            record.pop("power_law", None)
        same(found, expected)


MISTAKES = {
    "parallel.tensor = 4 does not divide model.num_query_groups = 2": ["--parallel", "tensor=4"],
    "context 3 = 3 does not divide the 2 processes: start 3": ["--parallel", "context=3"],
    "'tensors=2' is none of tensor=N, pipeline=N": ["--parallel", "tensors=2"],
    "use at most 4 stages": ["--parallel", "pipeline=8"],
    "parallel.expert = 2 needs model.num_moe_experts": ["--parallel", "expert=2"],
    "1 samples for 2 data-parallel ranks": ["--samples", 1],
    "1 samples for 2 data-parallel ranks: start fewer": ["--routing", "--routing-samples", 1],
    "needs one process, but 2 were started": ["--lm-eval", "arc"],
    "sequence_length = 127 is not a multiple of": ["--parallel", "tensor=2,sequence=true", "--sequence-length", "127"],
}


def test_mistakes_are_named(run, tmp_path):
    cases = [[run, *arguments, "--output", tmp_path] for arguments in MISTAKES.values()]
    for message, output in zip(MISTAKES, on_ranks(2, cases, code=2), strict=True):
        assert message in output, output
    (output,) = on_ranks(1, [[run, "--parallel", "tensor=2"]], code=2)
    assert "start 2" in output


def test_what_only_training_had_does_not_keep_a_run_from_being_read(tmp_path):
    half = {"training__precision": "bf16", "training__gradient_precision": "bf16"}
    config = small_config(tmp_path, training__steps=3, parallel__distributed_optimizer=True, **half)
    run_ranks(1, train_here, config)
    found = found_config(find_checkpoint(Path(config.run.dir)))
    assert (found.training.precision, found.training.gradient_precision) == ("bf16", "fp32")


def test_what_a_run_had_is_what_it_is_evaluated_with(run):
    sizes: dict[str, Any] = {"tensor": 2, "sequence": True, "pipeline": 2, "context": 2}
    own = ParallelConfig(**sizes, virtual_pipeline=2, pipeline_layers=[1, 1, 1, 1])
    config = found_config(find_checkpoint(run))
    found = evaluation_layout(config, own, None, 8)
    assert found == ParallelConfig(**sizes, pipeline_layers=[2, 2])
    assert evaluation_layout(config, own, None, 1) == ParallelConfig()
    assert evaluation_layout(config, own, "tensor=2", 2) == ParallelConfig(tensor=2, sequence=True)
    assert evaluation_layout(config, own, "pipeline=3", 3).pipeline_layers == [2, 1, 1]
    again = config.training.model_copy(update={"recompute": "full", "recompute_layers": 4})
    assert evaluation_layout(config.model_copy(update={"training": again}), own, "pipeline=2", 2).pipeline == 2
    with pytest.raises(ValueError, match="own sizes on 4 processes.*= 8 does not divide.*--parallel context=4"):
        evaluation_layout(config, own, None, 4)
