"""Generation: greedy choice is the argmax of the logits, sampling is seeded, padding is never chosen."""

from __future__ import annotations

import pytest
import torch

from moba_megatron.generation.sampling import generate, next_token


class Counting(torch.nn.Module):
    """Logits that prefer the id after the last one, and a padded row that everything else loses to."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens, position_ids, attention_mask):
        assert position_ids.tolist() == [list(range(tokens.size(1)))]
        logits = torch.nn.functional.one_hot((tokens + 1) % 8, 9).float() * 4
        logits[..., 8] = 100.0
        return logits


def test_greedy_follows_the_best_token_and_never_the_padding():
    assert generate(Counting(), [1], max_new_tokens=4, vocab_size=8, temperature=0) == [2, 3, 4, 5]


def test_the_stop_token_ends_and_is_left_out():
    assert generate(Counting(), [1], max_new_tokens=9, vocab_size=8, temperature=0, stop_id=4) == [2, 3]


def test_sampling_is_decided_by_the_seed():
    settings = {"max_new_tokens": 30, "vocab_size": 8, "temperature": 3.0, "top_p": 1.0}
    runs = [generate(Counting(), [1], seed=seed, **settings) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = [next_token(logits, temperature=1.0, top_p=0.7, generator=generator) for _ in range(200)]
    assert set(drawn) == {0, 1}
    assert abs(drawn.count(0) / 200 - 0.5 / 0.8) < 0.15


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"prompt": []}])
def test_wrong_settings_are_refused(wrong):
    arguments = {"prompt": [1], "max_new_tokens": 1, "vocab_size": 8, **wrong}
    with pytest.raises(ValueError, match=r"temperature|top_p|prompt"):
        generate(Counting(), **arguments)
