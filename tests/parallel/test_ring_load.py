"""The work of a ring under MoBA, against counted choices."""

import pytest
import torch

from moba_megatron.parallel.ring_load import by_rank, random_choice_factor, ring_factor


def counted(ranks: int, blocks: int, top_k: int) -> float:
    """The factor of drawn choices: every query chooses past blocks at random, ten queries a block."""
    generator, chunk = torch.Generator().manual_seed(0), blocks // (2 * ranks)
    work = torch.zeros(2 * ranks, 2 * ranks)
    for block in range(blocks):
        for _ in range(10):
            chosen = torch.randperm(block, generator=generator)[: top_k - 1] // chunk
            work[block // chunk] += torch.bincount(chosen, minlength=2 * ranks)
        work[block // chunk, block // chunk] += 5  # half of its own block
    return ring_factor(by_rank(work.tolist()))


@pytest.mark.parametrize(("ranks", "blocks", "top_k"), [(2, 64, 3), (4, 256, 8), (8, 512, 3), (8, 512, 16)])
def test_random_choice_is_counted(ranks, blocks, top_k):
    assert random_choice_factor(ranks, blocks, top_k) == pytest.approx(counted(ranks, blocks, top_k), rel=0.03)


def test_full_attention_is_even():
    assert random_choice_factor(8, 2, 2) == random_choice_factor(4, 3.5, 4) == 1.0
    whole = [[1.0 if key < query else 0.5 * (key == query) for key in range(16)] for query in range(16)]
    assert ring_factor(by_rank(whole)) == 1.0
