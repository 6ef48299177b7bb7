"""Inputs of the benchmarks choose what their names say."""

import pytest
import torch

from moba_megatron.benchmark.inputs import chosen_inputs, counted_ring_factor, hottest_load, past_choices
from moba_megatron.parallel.ring_load import random_choice_factor

LENGTH, HEADS, BLOCK, TOP_K = 4096, 4, 32, 5


def choices_of(kind: str, dtype: str = "fp32") -> torch.Tensor:
    q, k, _ = chosen_inputs(kind, LENGTH, HEADS, 2, 64, dtype, "cpu", 0, BLOCK)
    return past_choices(q, k, BLOCK, TOP_K)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_queries_choose(dtype):
    found = {kind: choices_of(kind, dtype) for kind in ("random", "sink", "hot", "local")}
    blocks, candidates = LENGTH // BLOCK, BLOCK * HEADS * torch.arange(LENGTH // BLOCK).clamp(max=TOP_K - 1).sum()
    assert all(choices.shape == (blocks, blocks) and choices.sum() == candidates for choices in found.values())
    assert (found["sink"][1:, 0] == BLOCK * HEADS).all()
    for block in found["hot"].sum(dim=0).topk(2).indices.tolist():
        assert (found["hot"][block + 1 :, block] == BLOCK * HEADS).all()
    back = torch.arange(blocks)[:, None] - torch.arange(blocks)
    distance = {kind: float((choices * back).sum() / choices.sum()) for kind, choices in found.items()}
    assert distance["local"] < 0.5 * distance["random"]
    for kind, choices in found.items():
        q, k, _ = chosen_inputs(kind, LENGTH, HEADS, 2, 64, dtype, "cpu", 0, BLOCK)
        chosen = choices.sum(dim=0).double()
        assert hottest_load(q, k, BLOCK, TOP_K) == pytest.approx(float(chosen.max() / chosen.mean()))


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_ring_of_random_choices_is_the_expected_one(ranks):
    counted = counted_ring_factor(choices_of("random"), HEADS, LENGTH, BLOCK, ranks)
    assert counted == pytest.approx(random_choice_factor(ranks, LENGTH / BLOCK, TOP_K), rel=0.05)
    assert counted_ring_factor(choices_of("sink"), HEADS, LENGTH, BLOCK, ranks) > 1.05 * counted
