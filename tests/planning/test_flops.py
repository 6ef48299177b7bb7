"""Pairs and operations from sizes, against counting."""

from __future__ import annotations

import pytest

from moba_megatron.config import config_from_dict
from moba_megatron.config.sizes import matrix_parameters
from moba_megatron.planning.flops import attended_pairs, training_flops_per_token


@pytest.mark.parametrize(
    ("length", "block_size", "top_k"), [(1, 4, 2), (64, 8, 3), (67, 8, 3), (99, 16, 1), (30, 8, 9)]
)
def test_pairs_are_counted_one_by_one(length, block_size, top_k):
    pairs = 0
    for t in range(length):
        block = t // block_size
        pairs += min(top_k - 1, block) * block_size + t % block_size + 1
    assert attended_pairs(length, block_size, top_k) == pairs


@pytest.mark.parametrize(
    ("length", "block_size", "top_k", "ratio"),
    [(4096, 512, 3, 1.9), (32768, 512, 3, 13.0), (131072, 512, 3, 51), (32768, 128, 8, 17.3), (2**20, 4096, 12, 11.4)],
)
def test_pair_ratios_of_the_design(length, block_size, top_k, ratio):
    assert attended_pairs(length) / attended_pairs(length, block_size, top_k) == pytest.approx(ratio, rel=0.03)


def small(**parallel):
    return config_from_dict({
        "run": {"dir": "r"},
        "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2},
        "attention": {"block_size": 16},
        "parallel": parallel,
        "data": {"train": "t", "tokenizer": "t", "sequence_length": 128},
        "training": {"steps": 1, "global_batch_size": 2},
        "optimizer": {"lr": 1e-3},
    })  # fmt: skip


def test_full_attention_costs_more_than_moba_and_both_more_than_the_matrices():
    config = small()
    dense = 6 * matrix_parameters(config.model, 100)
    moba = training_flops_per_token(config, 100, [(16, 3), (16, 3)])
    full = training_flops_per_token(config, 100, [None, None])
    assert dense < moba < full
    assert full - dense == pytest.approx(12 * 64 * 2 * (128 + 1) / 2)
