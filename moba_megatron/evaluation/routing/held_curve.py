"""What any number of blocks would hold: the mass of full attention that the first K - 1 past blocks of a choice have,
together with the query's own, for every K.

Legend: Q sampled queries, N heads, M past blocks of a query at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moba_megatron.evaluation.routing.capture import Captured
from moba_megatron.evaluation.routing.mass import (
    RoutingChoice,
    cumulative_probabilities,
    mass_of,
    own_and_past,
    past_ids,
)
from moba_megatron.ops.layout import block_layout


@dataclass(frozen=True)
class HeldCurve:
    """Sums over sampled queries, fp64.

    Attributes:
        held: [N, M], at place i the mass that i past blocks and the own one hold, summed over the queries that have
            more than i past blocks.
        queries: [M], how many those are.
    """

    held: Tensor
    queries: Tensor


def held_curve(seen: Captured, queries: Tensor) -> HeldCurve:
    """The curve of these heads' own choice, as if each had as many blocks as there are.

    Args:
        queries: int64 [Q], positions in the pack, rising.
    """
    attention = seen.attention
    layout = block_layout(seen.q.shape[0], attention.block_size, seen.cu_seqlens, device=seen.q.device)
    most, alike = int(layout.block_T[queries].max()), attention.selection.with_one_budget
    by = "own" if seen.chooser(attention.selection) is None else "index"
    ids_QNM = past_ids(seen, queries, RoutingChoice(attention.block_size, most + 1, alike, by))
    held = torch.zeros(seen.q.shape[1], most, dtype=torch.float64)
    for rows, first, cumulative in cumulative_probabilities(seen, queries):
        own, past = own_and_past(cumulative, queries[rows] - first, attention.block_size)
        chosen = mass_of(past, ids_QNM[rows])[..., : most - 1]
        curve = torch.cat([own.unsqueeze(-1), chosen], dim=-1).double().cumsum(dim=-1)
        more = layout.block_T[queries[rows]].view(-1, 1, 1) > torch.arange(most, device=queries.device)
        held += (curve * more).sum(dim=0).cpu()
    past_blocks = layout.block_T[queries].cpu()
    return HeldCurve(held, (past_blocks[:, None] > torch.arange(most)).sum(dim=0).double())


def heads_joined(curves: list[HeldCurve]) -> HeldCurve:
    """The curve of several heads' parts on the same queries."""
    return HeldCurve(torch.cat([curve.held for curve in curves]), curves[0].queries)


def queries_joined(curves: list[HeldCurve]) -> HeldCurve:
    """The curve over all queries of several samples."""
    most = max(curve.queries.numel() for curve in curves)

    def total(tables: list[Tensor]) -> Tensor:
        return torch.stack([torch.nn.functional.pad(x, (0, most - x.shape[-1])) for x in tables]).sum(dim=0)

    return HeldCurve(total([curve.held for curve in curves]), total([curve.queries for curve in curves]))
