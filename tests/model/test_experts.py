"""Mixtures of experts: every layout of experts gives the losses, the gradients and the load of one rank."""

from __future__ import annotations

import pytest
import torch
from distributed import run_ranks
from moe_examples import SIGMOID, SOFTMAX, course_of_each, mixture

from moba_megatron.model import builder

STEPS = 2
SEQUENCE = {"tensor": 2, "sequence": True}
LAYOUTS = {
    2: [
        {"expert": 2},
        {"expert": 2, "expert_dispatcher": "allgather", "distributed_optimizer": True},
        {"expert": 2, "context": 2},
        {"expert": 2, **SEQUENCE},
        # Whole experts on ranks that share the dense layers, and shared experts on ranks that have these whole.
        SEQUENCE,
        {"expert_tensor": 2, "expert_dispatcher": "allgather"},
        {"pipeline": 2},
    ],
    4: [{"expert": 4}, {"expert": 2, "pipeline": 2}, {"expert": 2, "context": 2, **SEQUENCE}],
}


@pytest.fixture(scope="module", params=[SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
def one_rank(request):
    """(shape, what one rank found)."""
    found = run_ranks(1, course_of_each, [mixture(request.param)], STEPS)[0][0]
    # Scores so far apart that rounding sends no token elsewhere.
    assert found["margin"] > 1e-5
    return request.param, found


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_layouts_agree(one_rank, ranks):
    shape, expected = one_rank
    configs = [mixture(shape, parallel) for parallel in LAYOUTS[ranks]]
    results = run_ranks(ranks, course_of_each, configs, STEPS, expected["gradients"])
    for number, parallel in enumerate(LAYOUTS[ranks]):
        for found in (rank[number] for rank in results):
            agrees(found, expected, str(parallel))


def agrees(found: dict, expected: dict, layout: str) -> None:
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6), layout
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5), layout
    assert found.get("error", 0.0) < 1e-5, layout
    experts = expected["tallies"][0].shape[1] - 3
    for ours, theirs in zip(found["tallies"], expected["tallies"], strict=True):
        # Padding of context parallelism is nobody's token.
        assert torch.equal(ours[:, : experts + 1], theirs[:, : experts + 1]), layout
        torch.testing.assert_close(ours[:, experts + 1 :], theirs[:, experts + 1 :], rtol=1e-5, atol=0)
    if len(found["biases"]) == len(expected["biases"]):
        assert all(map(torch.equal, found["biases"], expected["biases"])), layout


def test_what_is_computed_twice_counts_once(one_rank):
    shape, expected = one_rank
    config = mixture(shape)
    parts = ["shared_experts", "mlp"] if shape is SOFTMAX else ["core_attn", "moe"]
    ways = [{"recompute": "full"}, {"recompute": parts}]
    again = [config.model_copy(update={"training": config.training.model_copy(update=way)}) for way in ways]
    for found, way in zip(run_ranks(1, course_of_each, again, STEPS, expected["gradients"])[0], ways, strict=True):
        agrees(found, expected, str(way))


@pytest.mark.slow
def test_chunks_of_unequal_layers_agree():
    """Also where a rank has no layer with experts."""
    layers = {"num_layers": 4, "moe_layer_freq": [0, 0, 1, 1]}
    expected = run_ranks(1, course_of_each, [mixture(SOFTMAX, **layers)], STEPS)[0][0]
    stages = {"pipeline": 2, "pipeline_layers": [1, 3]}
    layouts = [{"pipeline": 2, "virtual_pipeline": 2}, {"pipeline": 2}, stages, {**stages, "expert": 2}]
    for parallel in layouts:
        config = mixture(SOFTMAX, parallel, **layers)
        for (found,) in run_ranks(4, course_of_each, [config], STEPS, expected["gradients"]):
            agrees(found, expected, str(parallel))


def test_the_losses_are_in_the_gradients(one_rank):
    """Without their weights the gradient of the router is another, by far more than layouts may differ."""
    shape, expected = one_rank
    name = "decoder.layers.1.mlp.router.weight"
    plain = mixture(shape, moe_aux_loss_coeff=0.0, moe_z_loss_coeff=None)
    without = run_ranks(1, course_of_each, [plain], 1)[0][0]["gradients"][name]
    whole = expected["gradients"][name]
    assert float((whole - without).abs().max() / whole.abs().max()) > 1e-2


def own_and_stock(shape):
    own = course_of_each([mixture(shape)], STEPS)[0]
    builder.with_routers = lambda block: block
    return own, course_of_each([mixture(shape)], STEPS)[0]


def test_one_rank_is_megatron_core():
    """On one rank, where nothing is padded, the router trains as megatron-core's own."""
    own, stock = run_ranks(1, own_and_stock, SOFTMAX)[0]
    assert own["losses"] == pytest.approx(stock["losses"], rel=1e-6)
    assert own["norms"] == pytest.approx(stock["norms"], rel=1e-5)
    assert own["tallies"][0].any() and not stock["tallies"][0].any()
