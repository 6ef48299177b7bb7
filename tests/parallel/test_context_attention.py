"""Every exchange gives, at every size, what one rank gives by the dense definition: outputs and all gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from parallel.examples import groups_for, oracle, pack_inputs, run_shard

from moba_megatron.parallel.attention import context_attention

ONE = [0, 96]
UNEVEN = [0, 16, 16, 72, 96]
TINY = [0, 8, 16, 24, 40, 48, 96]
PACKS = {"one": ONE, "uneven": UNEVEN, "tiny": TINY}
# Blocks that divide a rank's chunks, that do not, that straddle chunks, exceed the shard, exceed every document; of one.
BLOCKS = (4, 5, 16, 60, 100, 1)
TOP_KS = (1, 2, 4, 200)


def cases(exchange: str):
    for name, bounds in PACKS.items():
        for block_size in BLOCKS:
            for top_k in TOP_KS:
                for heads, groups in ((4, 4), (8, 2)) if exchange != "a2a" else ((4, 4), (16, 4)):
                    yield name, bounds, heads, groups, block_size, top_k
        yield name, bounds, 8, 4, None, None


def compare(exchange: str) -> list[str]:
    """On one of several ranks: the cases that disagree."""
    size, rank = dist.get_world_size(), dist.get_rank()
    groups_ = groups_for(exchange)
    wrong = []
    for name, bounds, heads, groups, block_size, top_k in cases(exchange):
        tensors = pack_inputs(bounds[-1], heads, groups, seed=len(name))
        expected, _ = oracle(*tensors, bounds, block_size, top_k)

        def attention(q, k, v, bounds=bounds, block_size=block_size, top_k=top_k):
            cu = torch.tensor(bounds, dtype=torch.int32) if len(bounds) > 2 else None
            return context_attention(
                q, k, v, cu, groups=groups_, exchange=exchange, block_size=block_size, top_k=top_k
            )

        got, positions = run_shard(attention, tensors, bounds, size, rank)
        for what, ours, whole in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
            error = (ours - whole[positions]).abs().max().item()
            if not error <= 1e-12:
                wrong.append(f"{what} {name} N={heads} G={groups} B={block_size} K={top_k}: {error}")
    return wrong


@pytest.mark.parametrize(
    ("exchange", "size"),
    [(e, c) for e in ("p2p", "all_gather", "a2a", "dispatch") for c in (1, 2, 4)] + [("a2a+p2p", 4)],
)
def test_exchanges_equal_the_definition(exchange, size):
    for rank, wrong in enumerate(run_ranks(size, compare, exchange, timeout=240)):
        assert not wrong, (rank, wrong[:10])
