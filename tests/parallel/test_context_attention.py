"""Every exchange gives, at every size, what one rank gives by the dense definition: outputs and all gradients."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from parallel.examples import groups_for, oracle, pack_inputs, run_shard

from moba_megatron.parallel.attention import context_attention
from moba_megatron.parallel.exchanges import EXCHANGES as TABLE

pytestmark = pytest.mark.once
PACKS = {"one": [0, 96], "uneven": [0, 16, 16, 72, 96], "tiny": [0, 8, 16, 24, 40, 48, 96]}
# Blocks that divide a chunk, that do not, that straddle chunks, exceed the shard, exceed every document; of one token.
BLOCKS = (4, 5, 16, 60, 100, 1)
TOP_KS = (1, 2, 4, 200)
# For three ranks, which trade no heads.
PACKS_OF_THREE = {"three": [0, 6, 18, 18, 90]}
ONE_LEVEL = [name for name, kind in TABLE.items() if not kind.two_levels]
WITHOUT_HEADS = [name for name, kind in TABLE.items() if not kind.trades_heads]
EXCHANGES = {1: ONE_LEVEL, 2: ONE_LEVEL, 3: WITHOUT_HEADS, 4: list(TABLE)}


def cases(size: int, whole: bool):
    """(boundaries, query heads, key heads, block size, top-k); without sizes: full attention.

    Args:
        whole: every pack with every block size and top-k; else each of these with one pack, where there are several.
    """
    packs = {1: {"uneven": PACKS["uneven"]}, 3: PACKS_OF_THREE}.get(size, PACKS)
    for number, bounds in enumerate(packs.values()):
        for place, block_size in enumerate(BLOCKS):
            for top_k in TOP_KS:
                if not whole and (place + TOP_KS.index(top_k)) % len(packs) != number:
                    continue
                # One or four query heads a key head; four key heads, so that four ranks can trade them.
                yield bounds, 4, 4, block_size, top_k
                if block_size != 1 and top_k in (2, 4):
                    yield bounds, 16, 4, block_size, top_k
        yield bounds, 8, 4, None, None


def disagreements(whole: bool) -> dict[str, list[str]]:
    """On one of several ranks: for each exchange the cases that disagree."""
    size, rank = dist.get_world_size(), dist.get_rank()
    cp_groups = {exchange: groups_for(exchange) for exchange in EXCHANGES[size]}
    wrong = {exchange: [] for exchange in cp_groups}
    for bounds, heads, kv_heads, block_size, top_k in cases(size, whole):
        tensors = pack_inputs(bounds[-1], heads, kv_heads, seed=len(bounds))
        expected, _ = oracle(*tensors, bounds, block_size, top_k)
        cu = torch.tensor(bounds, dtype=torch.int32) if len(bounds) > 2 else None
        for exchange in cp_groups:
            settings = {"exchange": exchange, "block_size": block_size, "top_k": top_k}
            attention = functools.partial(context_attention, cu_seqlens=cu, cp_groups=cp_groups[exchange], **settings)
            got, positions = run_shard(attention, tensors, bounds, size, rank)
            for what, ours, whole in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
                error = (ours - whole[positions]).abs().max().item()
                if not error <= 1e-12:
                    case = f"{what} {bounds} N={heads} G={kv_heads} B={block_size} K={top_k}: {error}"
                    wrong[exchange].append(case)
    return wrong


@functools.cache
def results(size: int, whole: bool = False) -> list[dict[str, list[str]]]:
    return run_ranks(size, disagreements, whole, timeout=600)


@pytest.mark.parametrize(
    ("size", "exchange"),
    [
        pytest.param(size, name, marks=pytest.mark.slow if size == 3 else ())
        for size in EXCHANGES
        for name in EXCHANGES[size]
    ],
)
def test_exchanges_equal_the_definition(size, exchange):
    for rank, wrong in enumerate(results(size)):
        assert not wrong[exchange], (rank, wrong[exchange][:10])


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_every_case_of_every_exchange(size):
    for rank, wrong in enumerate(results(size, whole=True)):
        assert not any(wrong.values()), (rank, wrong)
