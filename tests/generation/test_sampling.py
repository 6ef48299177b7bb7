"""The choice of a token: the best one, or sampled by a seed from those that have the probability."""

from __future__ import annotations

import torch

from moba_megatron.generation.sampling import next_token


def drawn(probabilities: list[float], count: int, seed: int = 0, **settings) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [next_token(torch.tensor(probabilities).log(), generator=generator, **settings) for _ in range(count)]


def test_greedy_is_the_best_token():
    assert drawn([0.2, 0.1, 0.4, 0.3], 3, temperature=0, top_p=1.0) == [2, 2, 2]


def test_sampling_is_decided_by_the_seed():
    runs = [drawn([0.125] * 8, 30, seed, temperature=3.0, top_p=1.0) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_temperature_flattens_the_choice():
    """At temperature 2 odds of 16 to 1 are 4 to 1."""
    assert abs(drawn([16 / 17, 1 / 17], 400, temperature=2.0, top_p=1.0).count(1) / 400 - 1 / 5) < 0.07


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    found = drawn([0.5, 0.3, 0.2], 200, temperature=1.0, top_p=0.7)
    assert set(found) == {0, 1}
    assert abs(found.count(0) / 200 - 0.5 / 0.8) < 0.15
