"""Integer arithmetic of the layout and of the bytes, against hand-made values."""

from __future__ import annotations

import re
from typing import get_args

import pytest
import torch
from parallel.examples import zigzag

from moba_megatron.config import Exchange
from moba_megatron.parallel.context_plan import ContextPlan
from moba_megatron.parallel.copies import choose_copies
from moba_megatron.parallel.exchange_kind import RankSizes
from moba_megatron.parallel.exchanges import EXCHANGES, choose_exchange, refusal, traffic
from moba_megatron.parallel.layout import check_positions, padded_boundaries, shard_positions

MEBIBYTE = 2**20


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("lengths", [[5], [1, 1, 1], [0, 7, 0, 30], [64, 3]])
@pytest.mark.parametrize("multiple", [1, 2, 3])
def test_padding_and_shards(size, lengths, multiple):
    true = torch.tensor([0, *lengths]).cumsum(0)
    padded = padded_boundaries(true, size, total_multiple=multiple)
    extra = padded.diff() - true.diff()
    each = 2 * size if size > 1 else 1
    assert (padded.diff() % each == 0).all() and (extra >= 0).all() and (extra[:-1] < each).all()
    assert padded[-1] % (size * multiple) == 0 and extra[-1] < each * size * multiple
    shards = [shard_positions(padded, size, rank) for rank in range(size)]
    assert [shard.tolist() for shard in shards] == [zigzag(padded.tolist(), size, rank) for rank in range(size)]
    assert torch.equal(torch.cat(shards).sort().values, torch.arange(int(padded[-1])))
    assert all((shard.diff() > 0).all() for shard in shards)


def test_a_wrong_layout_raises():
    cu = torch.tensor([0, 8, 24])
    right = torch.tensor(zigzag([0, 8, 24], 2, 1))
    positions = torch.where(right < 8, right, right - 8)
    check_positions(positions, cu, 2, 1)
    with pytest.raises(
        ValueError, match="not in zigzag layout: token 0 of context-parallel rank 1 of 2 has position 4"
    ):
        check_positions(torch.arange(12) + 4, cu, 2, 1)
    with pytest.raises(ValueError, match="11 tokens on context-parallel rank 1 of 2, but .* 24 .* put 12 there"):
        check_positions(positions[:-1], cu, 2, 1)
    with pytest.raises(
        ValueError, match="document 1 of the pack has 6 tokens, not a multiple of 2 x .* = 4: pad it to 8"
    ):
        shard_positions(torch.tensor([0, 8, 14]), 2, 0)


def test_a_plan_by_hand():
    """One document of 16 tokens over two ranks, blocks of 6: rank 0 holds 0-3 and 12-15, rank 1 holds 4-11."""
    first, second = (ContextPlan(torch.tensor([0, 16]), 6, (1, 2), rank, torch.device("cpu")) for rank in (0, 1))
    assert first.here.kv_blocks() == [(0, 4), (4, 8)]
    assert first.here.causal_spans() == [(0, 2, 4)]
    assert second.here.kv_blocks() == [(0, 2), (2, 8)]
    assert second.here.kv_block_of_block().tolist() == [0, 1, -1]
    # Rank 1's tokens 4 and 5 see rank 0's tokens 0 to 3 of their own block; nobody else sees more than choices.
    assert second.fragment(0).own_kv_block_T.tolist() == [0, 0, -1, -1, -1, -1, -1, -1]
    assert first.fragment(1).own_kv_block_T is None
    assert second.own_blocks.causal_spans == [(0, 1, 2), (2, 1, 6)]


LLAMA_8B = {"heads": 32, "kv_heads": 8, "head_size": 128, "element_bytes": 2}


def test_bytes_of_llama_8b_at_128k_over_8_ranks():
    sizes = RankSizes(tokens=16384, block_size=4096, top_k=12, **LLAMA_8B)
    assert traffic("p2p", sizes, 8).forward == 448 * MEBIBYTE
    assert traffic("p2p", sizes, 8).backward == (448 + 896) * MEBIBYTE
    assert traffic("all_gather", sizes, 8).backward == (448 + 448) * MEBIBYTE
    assert traffic("a2a", sizes, 8).forward == 280 * MEBIBYTE
    no_ids = RankSizes(tokens=16384, block_size=4096, top_k=1, **LLAMA_8B)
    assert traffic("dispatch", no_ids, 8, remote_owners=1).forward == 258 * MEBIBYTE
    ring_between_nodes = RankSizes(tokens=16384 * 8, heads=4, kv_heads=1, head_size=128, element_bytes=2)
    assert traffic("p2p", ring_between_nodes, 8).forward == 448 * MEBIBYTE
    assert traffic("a2a+p2p", RankSizes(16384, **LLAMA_8B), 64, (8, 8)).forward == (280 + 448) * MEBIBYTE


def test_dispatch_does_not_grow_with_the_sequence():
    sizes = RankSizes(tokens=16384, block_size=512, top_k=3, **LLAMA_8B)
    assert traffic("dispatch", sizes, 64) == traffic("dispatch", sizes, 512)
    assert traffic("p2p", sizes, 512).forward > 8 * traffic("p2p", sizes, 64).forward


def uniform_demand(plan: ContextPlan, heads: int, picks: int) -> torch.Tensor:
    """Choices by block if every query picked uniformly among its past blocks, without those on its own rank."""
    blocks, size = plan.layout.num_blocks, plan.layout.block_size
    each = torch.zeros(blocks, dtype=torch.float64)
    for own in range(1, blocks):
        each[:own] += heads * size * min(picks, own) / own
    return (each * (plan.size - 1) / plan.size).long()


@pytest.mark.parametrize("size", [16, 64])
def test_only_blocks_that_pay_are_copied(size):
    """Causality makes early blocks more wanted; copies to many ranks would cost more than the queries. A block that all
    queries want is another matter."""
    plan = ContextPlan(torch.tensor([0, size * 1024]), 64, (1, size), 0, torch.device("cpu"))
    demand = uniform_demand(plan, heads=32, picks=2)
    hot, load = choose_copies(plan, demand, num_kv_heads=8)
    assert load.most > 2 * load.mean
    rows = plan.layout.block_lengths()[hot].sum() * 8 * (size - 1)
    assert rows < demand[hot].sum() or not hot.any()
    demand[5] = 32 * size * 1024
    hot, load = choose_copies(plan, demand, num_kv_heads=8)
    assert hot[5] and load.most_after < load.most / 4


def test_auto_follows_the_bytes():
    sizes = RankSizes(tokens=16384, block_size=512, top_k=3, **LLAMA_8B)
    assert choose_exchange(sizes, 8).name == "a2a"
    assert choose_exchange(sizes, 16).levels == (8, 2)
    # One key head a rank: no heads to trade.
    one = RankSizes(tokens=16384, heads=4, kv_heads=1, head_size=128, element_bytes=2, block_size=4096, top_k=12)
    assert choose_exchange(one, 4).name == "p2p" and "dispatch" in choose_exchange(one, 4).reason
    assert choose_exchange(RankSizes(16384, 32, 1, 128, 2), 512).name == "p2p"
    # What makes the host wait is told where it is taken.
    far = choose_exchange(sizes, 512)
    assert far.name == "dispatch" and far.reason.endswith(
        "the host waits for the device 2 times a layer and forward pass"
    )
    assert "the host waits" not in choose_exchange(sizes, 16).reason


@pytest.mark.parametrize(
    ("exchange", "size", "levels", "message"),
    [
        (
            "a2a",
            16,
            None,
            "use a context-parallel size of 1 or 2 or 4 or 8, or the exchange a2a.p2p with .8, 2., or p2p",
        ),
        ("a2a+p2p", 16, (4, 2), "levels 4 x 2 are not the 16 context-parallel ranks"),
        ("a2a+p2p", 6, (3, 2), "3 ranks do not divide 32 query heads and 8 key heads .*: use 1 or 2 ranks"),
        ("a2a+p2p", 8, (8, 1), "is a2a: use a2a"),
    ],
)
def test_refusals_name_numbers_and_what_works(exchange, size, levels, message):
    assert re.search(message, refusal(exchange, RankSizes(1024, **LLAMA_8B), size, levels))


def test_the_configuration_knows_the_exchanges():
    assert get_args(Exchange) == ("auto", *EXCHANGES)
