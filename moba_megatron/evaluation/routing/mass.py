"""How much of full attention a selection of blocks holds: exact attention mass, on sampled queries.

For each sampled query and head the softmax of full causal attention over its document is computed as it is (fp32, a few
queries at a time), and added up by block. From the masses of the blocks follows what a selection holds, what the best
selection of as many blocks would hold, and what the nearest blocks would.

Legend: Q sampled queries, N heads, T tokens of the pack, M blocks of the query's document, K blocks a query.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moba_megatron.evaluation.routing.capture import Captured
from moba_megatron.ops.layout import block_layout
from moba_megatron.ops.router import for_heads
from moba_megatron.ops.selection import MOBA, Selection
from moba_megatron.ops.steps import steps_of

# Probabilities in memory at once.
MOST_PROBABILITIES = 2**25


@dataclass(frozen=True)
class RoutingChoice:
    """Blocks of `block_size` tokens, `top_k` of them a query (the current one counted), chosen as `selection` says; by
    the attention's `own` queries and keys, or by those of an `index`."""

    block_size: int
    top_k: int
    selection: Selection = MOBA
    by: Literal["own", "index"] = "own"

    def __str__(self) -> str:
        by = " by the index" if self.by == "index" else ""
        return f"B={self.block_size} {self.selection.words(self.top_k)}{by}"


@dataclass
class Mass:
    """Shares of full attention's mass for each sampled query and head, fp32 [Q, N]: `held` by the choice, by the
    `best` choice of as many blocks, and by the current and the `nearest` blocks."""

    held: Tensor
    best: Tensor
    nearest: Tensor


def attention_masses(seen: Captured, queries: Tensor, choices: list[RoutingChoice]) -> list[Mass]:
    """The mass that each choice holds.

    Args:
        queries: int64 [Q], positions in the pack, rising.
        choices: what to compare, on the same queries.
    """
    ids = [past_ids(seen, queries, choice) for choice in choices]
    parts: list[list[Mass]] = [[] for _ in choices]
    for rows, first, cumulative in cumulative_probabilities(seen, queries):
        for place, choice in enumerate(choices):
            positions = queries[rows] - first
            parts[place].append(_block_masses(cumulative, positions, choice, ids[place][rows]))
    return [joined(some) for some in parts]


def joined(parts: list[Mass]) -> Mass:
    """The masses of all queries of several parts."""
    fields = ([part.held for part in parts], [part.best for part in parts], [part.nearest for part in parts])
    return Mass(*map(torch.cat, fields))


def past_ids(seen: Captured, queries: Tensor, choice: RoutingChoice) -> Tensor:
    """int32 [Q, N, K - 1], past blocks within the document, -1 where fewer."""
    layout = block_layout(seen.q.shape[0], choice.block_size, seen.cu_seqlens, device=seen.q.device)
    steps = steps_of("gathered", choice.selection)
    index = seen.index if choice.by == "index" else None
    q, k = (seen.q, seen.k) if index is None else (index.q, index.k)
    ids = steps.select_past(q[queries], steps.summarize(k, layout), layout.at(queries), choice.top_k - 1)
    return for_heads(ids, seen.q.shape[1])


def cumulative_probabilities(seen: Captured, queries: Tensor) -> Iterator[tuple[slice, int, Tensor]]:
    """For a few neighbouring queries of one document at a time: which they are, the first token of the document, and
    their probabilities summed up from it, fp32 [Q', N, tokens + 1], starting with 0."""
    cu_seqlens = [0, seen.q.shape[0]] if seen.cu_seqlens is None else seen.cu_seqlens.tolist()
    qheads_per_kvhead = seen.q.shape[1] // seen.k.shape[1]
    positions = queries.tolist()
    at = 0
    while at < len(positions):
        document = next(d for d in range(len(cu_seqlens) - 1) if positions[at] < cu_seqlens[d + 1])
        first, end = cu_seqlens[document], cu_seqlens[document + 1]
        step = max(1, MOST_PROBABILITIES // (seen.q.shape[1] * (end - first)))
        stop = at + 1
        while stop < len(positions) and stop - at < step and positions[stop] < end:
            stop += 1
        last = positions[stop - 1] + 1
        q = seen.q[queries[at:stop]].float().unflatten(1, (-1, qheads_per_kvhead))
        scores = torch.einsum("qgrd,tgd->qgrt", q, seen.k[first:last].float()).flatten(1, 2) * seen.softmax_scale
        future = torch.arange(first, last, device=queries.device) > queries[at:stop, None]
        probabilities = scores.masked_fill_(future[:, None], -torch.inf).softmax(dim=-1)
        yield slice(at, stop), first, torch.nn.functional.pad(probabilities.cumsum(dim=-1), (1, 0))
        at = stop


def own_and_past(cumulative: Tensor, positions: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Mass of each query's own block [Q', N] and of its document's blocks [Q', N, M], 0 where they are not past;
    `positions` [Q'] count from the start of the document."""
    length = cumulative.shape[-1] - 1
    bounds = torch.arange(0, length + block_size, block_size, device=positions.device).clamp_(max=length)
    by_block = cumulative[..., bounds].diff(dim=-1)
    own_block = positions // block_size
    own = by_block.gather(-1, own_block.view(-1, 1, 1).expand(*by_block.shape[:2], 1)).squeeze(-1)
    blocks = torch.arange(by_block.shape[-1], device=positions.device)
    return own, by_block * (blocks < own_block[:, None])[:, None]


def mass_of(past: Tensor, ids: Tensor) -> Tensor:
    """Mass [Q', N, K] of the past blocks [Q', N, M] that ids [Q', N, K] name, 0 for -1."""
    return past.gather(-1, ids.clamp(min=0).long()).masked_fill(ids < 0, 0)


def _block_masses(cumulative: Tensor, positions: Tensor, choice: RoutingChoice, ids: Tensor) -> Mass:
    """Masses of one choice, `ids` [Q', N, K - 1]."""
    own, past = own_and_past(cumulative, positions, choice.block_size)
    heads, device = past.shape[1], positions.device
    budgets = torch.tensor(choice.selection.budgets or (choice.top_k,), device=device)
    most_N1 = budgets.repeat_interleave(heads // len(budgets))[:, None] - 1
    best = past.topk(min(ids.shape[-1], past.shape[-1]), dim=-1).values
    best = best * (torch.arange(best.shape[-1], device=device) < most_N1)
    distance = (positions // choice.block_size)[:, None, None] - torch.arange(past.shape[-1], device=device)
    near = past * (distance <= most_N1)
    return Mass(own + mass_of(past, ids).sum(dim=-1), own + best.sum(dim=-1), own + near.sum(dim=-1))
