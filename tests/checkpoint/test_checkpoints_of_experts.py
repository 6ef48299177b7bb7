"""Checkpoints of mixtures of experts: they go on at any layout of experts, and bit for bit at their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed import run_ranks
from small_run import numbers_of, read_metrics, small_config, train_here

from moba_megatron.config import Config

SHAPE = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 64,
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 24,
    "moe_layer_freq": [0, 1],
    "moe_shared_expert_intermediate_size": 16,
    "moe_aux_loss_coeff": 0.01,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
}
ONE, TWO, FOUR = {}, {"expert": 2}, {"expert": 2, "pipeline": 2}


def settings(folder: Path, name: str, layout: dict, **changes) -> Config:
    parallel = {f"parallel__{key}": value for key, value in layout.items()}
    model = {f"model__{key}": value for key, value in SHAPE.items()}
    sizes = {"training__steps": 6, "training__micro_batch_size": 1, "checkpoint__every": 3}
    return small_config(folder, run__dir=str(folder / name), **{**model, **sizes, **parallel, **changes})


def run(folder: Path, name: str, layout: dict, **changes) -> list[dict]:
    config = settings(folder, name, layout, **changes)
    ranks = config.parallel.fewest_ranks
    run_ranks(ranks, train_here, config, ranks)
    return read_metrics(folder / name)


@pytest.fixture(
    scope="module",
    params=[("fp32", True), pytest.param(("bf16", False), marks=pytest.mark.slow)],
    ids=["fp32-distributed", "bf16-plain"],
)
def runs(request, tmp_path_factory):
    """(folder, settings, metrics by name) of a run on one rank and one on two."""
    folder = tmp_path_factory.mktemp("experts")
    precision, distributed = request.param
    changes = {"training__precision": precision, "parallel__distributed_optimizer": distributed}
    return folder, changes, {name: run(folder, name, at, **changes) for name, at in (("one", ONE), ("two", TWO))}


@pytest.mark.parametrize(
    ("source", "layout"),
    [
        ("one", TWO),
        ("two", ONE),
        pytest.param("two", FOUR, marks=pytest.mark.slow),
        pytest.param("one", ONE, marks=pytest.mark.slow),
        ("two", TWO),
    ],
    ids=["1-to-2", "2-to-1", "2-to-2x2", "1-to-1", "2-to-2"],
)
def test_a_run_goes_on(runs, source, layout):
    folder, changes, metrics = runs
    name = f"{source}-{len(layout)}"
    after = run(folder, name, layout, checkpoint__resume=str(folder / source / "checkpoints/step_3"), **changes)
    before = metrics[source][3:]
    if layout == {"one": ONE, "two": TWO}[source]:
        assert numbers_of(after) == numbers_of(before)
        assert [line["experts"] for line in after] == [line["experts"] for line in before]
        return
    exact = changes["training__precision"] == "fp32"
    for ours, theirs in zip(after, before, strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5 if exact else 1e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4 if exact else 3e-2)


def test_two_ranks_train_as_one(runs):
    _, changes, metrics = runs
    exact = changes["training__precision"] == "fp32"
    for ours, theirs in zip(metrics["two"], metrics["one"], strict=True):
        for name in ("loss", "aux_loss", "balance_loss"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6 if exact else 1e-3)


def test_what_a_step_says_of_its_experts(runs):
    folder, _, metrics = runs
    for line in [*metrics["one"], *read_metrics(folder / "one", "evaluations.jsonl")]:
        (layer,) = line["experts"]
        assert layer["layer"] == 2 and 1 <= layer["load"] <= 4 and 0 < layer["entropy"] <= 1
        assert layer["dead"] == 0 and layer["dropped"] == pytest.approx(0.0)
        # Even load is 1; the loss of the language model is apart.
        assert 0.9 < line["balance_loss"] < 4 and "z_loss" not in line
        assert line["aux_loss"] == pytest.approx(0.01 * line["balance_loss"])
