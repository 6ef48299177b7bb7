"""What an index that chooses blocks adds to operations, memory and time, from its sizes."""

from __future__ import annotations

import pytest
from test_flops import small

from moba_megatron.config import AttentionConfig, Config
from moba_megatron.model.schedule import AttentionSchedule
from moba_megatron.ops.pairs import attended_pairs, chosen_blocks, scored_pairs
from moba_megatron.planning.flops import training_flops_per_token
from moba_megatron.planning.index_shape import IndexShape
from moba_megatron.planning.kernel_model import AttentionSizes, backward_work, route_work
from moba_megatron.planning.memory import estimate_memory

VOCABULARY = 128


def indexed(**router) -> Config:
    config = small()
    attention = AttentionConfig.model_validate({"block_size": 16, "router": "index", "router_dim": 6, **router})
    return config.model_copy(update={"attention": attention})


def flops(config: Config) -> float:
    schedule = AttentionSchedule.from_config(config.attention, 2)
    return training_flops_per_token(config, VOCABULARY, [layer.sizes for layer in schedule.stages[0]])


@pytest.mark.parametrize(
    ("router", "queries", "keys", "passes"),
    [
        ({}, 2, 1, 2),
        ({"router_heads": "query", "router_keys": "key"}, 4, 2, 2),
        ({"router_loss": "none"}, 2, 1, 1),
        ({"router_loss": "dense"}, 2, 1, 2),
    ],
)
def test_operations(router, queries, keys, passes):
    """Two layers; 64 hidden channels, 4 heads of 16, 128 tokens in blocks of 16, 3 of them a query."""
    added = flops(indexed(**router)) - flops(small())
    scores = {
        "sparse": chosen_blocks(128, 16, 3) * 6 * 6 * queries,
        "dense": 2 * 16 * 4 * attended_pairs(128) + scored_pairs(128, 16) * 6 * 6 * queries,
        "none": 0,
    }[router.get("router_loss", "sparse")]
    assert added == pytest.approx(2 * (2 * 64 * 6 * (queries + keys) * passes + scores / 128))


def test_layers_that_attend_fully_and_models_without_an_index_count_as_before():
    assert flops(indexed(kind="full", layers={1: {"kind": "moba"}})) < flops(indexed(layers={2: {"top_k": 8}}))
    full = indexed(kind="full").model_copy(update={"attention": AttentionConfig(kind="full")})
    assert IndexShape.of(full.attention, full.model) is None
    assert training_flops_per_token(indexed(), VOCABULARY, [None, None]) == flops(full)


def test_memory_and_kernels():
    config, schedule = indexed(), AttentionSchedule.from_config(indexed().attention, 2)
    with_index, without = (estimate_memory(c, schedule, VOCABULARY, 1, "cuda")[0] for c in (config, small()))
    # bf16 queries and keys of 3 heads of 6, three times; 4 bytes for two scores of two heads.
    assert with_index.activations - without.activations == 2 * 3 * 128 * 3 * 6 * 2
    assert with_index.moba - without.moba == 2 * 4 * 128 * 2 * 2
    assert with_index.weights > without.weights
    sizes = {"tokens": 2**15, "heads": 16, "kv_heads": 4, "head_size": 128, "block_size": 128, "top_k": 9}
    plain, small_index = AttentionSizes(**sizes), AttentionSizes(**sizes, index=IndexShape(4, 1, 32, "sparse"))
    assert (
        sum(w.products for w in route_work(small_index, False))
        == sum(w.products for w in route_work(plain, False)) / 16
    )
    assert [work.name for work in backward_work(small_index)][0] == "index: sparse loss"
    assert [work.name for work in backward_work(small_index)][1:] == [work.name for work in backward_work(plain)]


def test_key_heads_with_a_k_of_their_own_cost_their_mean():
    even, uneven = (
        small().model_copy(update={"attention": AttentionConfig.model_validate({"block_size": 16, "layers": layers})})
        for layers in ({1: {"top_k": 3}}, {1: {"top_k": [2, 4]}})
    )
    shares = [attended_pairs(128, 16, k) for k in (2, 3, 4)]
    assert flops(uneven) - flops(even) == pytest.approx(12 * 16 * 4 * ((shares[0] + shares[2]) / 2 - shares[1]) / 128)
