"""Inputs for context parallelism, and their zigzag shards written without the package: by lists of chunks."""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist

from moba_megatron.ops.reference import reference_attend, reference_select
from moba_megatron.parallel.attention import ContextGroups

HEAD_SIZE = 8


def zigzag(bounds: list[int], size: int, rank: int) -> list[int]:
    """Positions that a rank holds: chunks r and 2 C - 1 - r of every document."""
    positions = []
    for start, end in itertools.pairwise(bounds):
        tokens = list(range(start, end))
        each = len(tokens) // (2 * size)
        chunks = [tokens[i * each : (i + 1) * each] for i in range(2 * size)]
        positions += chunks[rank] + chunks[2 * size - 1 - rank]
    return positions if size > 1 else list(range(bounds[-1]))


def pack_inputs(tokens: int, heads: int, kv_heads: int, dtype=torch.float64, seed: int = 0):
    """q, k, v and the gradient of the output, for the whole pack."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, n, HEAD_SIZE) for n in (heads, kv_heads, kv_heads, heads)]
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def oracle(q, k, v, do, bounds: list[int], block_size: int | None, top_k: int | None):
    """(out, dq, dk, dv) by the dense definition on the whole pack, and the chosen ids."""
    cu = torch.tensor(bounds, dtype=torch.int32)
    size = block_size or bounds[-1]
    ids = reference_select(q, k, cu, size, (top_k or 1) - 1)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = reference_attend(*leaves, ids, cu, size, HEAD_SIZE**-0.5)[0]
    return [out.detach(), *torch.autograd.grad(out, leaves, do)], ids


def smallest_margin(q, k, bounds: list[int], block_size: int, top_k: int) -> float:
    """Smallest difference between the last chosen and the first refused score, over all queries and heads that refuse
    any; infinite where none does."""
    smallest = float("inf")
    for start, end in itertools.pairwise(bounds):
        for block in range(top_k, -(-(end - start) // block_size)):
            past = k[start : start + block * block_size].unflatten(0, (block, block_size)).mean(1)
            past = past.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            rows = slice(start + block * block_size, min(end, start + (block + 1) * block_size))
            scores = torch.einsum("tnd,mnd->tnm", q[rows], past).sort(dim=-1, descending=True).values
            if top_k > 1:
                smallest = min(smallest, float((scores[..., top_k - 2] - scores[..., top_k - 1]).min()))
    return smallest


def groups_for(exchange: str) -> ContextGroups:
    """The default process group, and for a2a+p2p its pairs and what lies across them."""
    whole = dist.group.WORLD
    if exchange != "a2a+p2p":
        return ContextGroups(whole)
    size, inner, outer = whole.size(), None, None
    for first in range(0, size, 2):
        group = dist.new_group([first, first + 1])
        inner = group if dist.get_rank() in (first, first + 1) else inner
    for offset in range(2):
        ranks = list(range(offset, size, 2))
        group = dist.new_group(ranks)
        outer = group if dist.get_rank() in ranks else outer
    return ContextGroups(whole, inner, outer)


def run_shard(attention, tensors, bounds: list[int], size: int, rank: int):
    """Out, dq, dk and dv of one rank's tokens, and these tokens' positions."""
    positions = torch.tensor(zigzag(bounds, size, rank))
    q, k, v, do = (x[positions] for x in tensors)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, do)], positions
