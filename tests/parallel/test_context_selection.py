"""Variants of the selection give, through every exchange and at sizes 1 and 2, what their dense definition gives."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from parallel.examples import HEAD_SIZE, groups_for, pack_inputs, run_shard

from moba_megatron.ops.reference import reference_attend, reference_select
from moba_megatron.ops.selection import Selection
from moba_megatron.parallel.attention import context_attention
from moba_megatron.parallel.exchanges import EXCHANGES as TABLE
from moba_megatron.parallel.wire import observe

BOUNDS = [0, 16, 16, 72, 96]
SELECTIONS = [
    Selection(summary="min_max"),
    Selection("threshold", threshold=0.7),
    Selection("threshold", "min_max", 0.4),
    Selection("recent"),
    Selection("sink_recent"),
    Selection(share_selection="mean"),
    Selection("threshold", "min_max", 0.4, "max"),
]
EXCHANGES = [name for name, kind in TABLE.items() if not kind.two_levels]


def expected(q, k, v, do, block_size: int, top_k: int, selection: Selection):
    """(out, dq, dk, dv) by the dense definition on the whole pack."""
    cu = torch.tensor(BOUNDS, dtype=torch.int32)
    ids = reference_select(q, k, cu, block_size, top_k - 1, selection)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = reference_attend(*leaves, ids, cu, block_size, HEAD_SIZE**-0.5)[0]
    return [out.detach(), *torch.autograd.grad(out, leaves, do)]


def disagreements() -> dict[str, list[str]]:
    """On one rank: for each exchange the cases that disagree, and selections without scores that sent summaries."""
    size, rank = dist.get_world_size(), dist.get_rank()
    wrong: dict[str, list[str]] = {}
    for exchange in EXCHANGES:
        cp_groups, wrong[exchange] = groups_for(exchange), []
        for block_size, top_k in ((5, 4), (16, 2), (60, 200)):
            budgets = (top_k, 1, max(1, top_k // 2), top_k)
            for selection in [*SELECTIONS, Selection(budgets=budgets), Selection("sink_recent", budgets=budgets)]:
                tensors = pack_inputs(BOUNDS[-1], 8, 4, seed=block_size)
                attention = functools.partial(
                    context_attention,
                    cu_seqlens=torch.tensor(BOUNDS, dtype=torch.int32),
                    cp_groups=cp_groups,
                    exchange=exchange,
                    block_size=block_size,
                    top_k=top_k,
                    selection=selection,
                )
                with observe() as seen:
                    got, positions = run_shard(attention, tensors, BOUNDS, size, rank)
                whole = expected(*tensors, block_size, top_k, selection)
                case = f"{selection} B={block_size} K={top_k}"
                for what, ours, all_of_it in zip(("out", "dq", "dk", "dv"), got, whole, strict=True):
                    error = (ours - all_of_it[positions]).abs().max().item()
                    wrong[exchange] += [f"{what} {case}: {error}"] * (not error <= 1e-12)
                scored = selection.uses_scores and exchange != "a2a" and size > 1 and block_size < 56
                wrong[exchange] += [f"summaries {case}: {seen.received}"] * (bool(seen.received["summaries"]) != scored)
    return wrong


@pytest.mark.parametrize("size", [1, 2])
def test_variants_equal_their_definition(size):
    for rank, wrong in enumerate(run_ranks(size, disagreements)):
        assert wrong == {exchange: [] for exchange in EXCHANGES}, rank
