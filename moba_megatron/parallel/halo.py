"""The tokens just before each token, where a sequence lies on several ranks: integer arithmetic for short causal
convolutions. No communication.

In the zigzag layout (`layout`) the few tokens before a token are mostly its rank's own; those before a chunk are the
last ones of other ranks' chunks. So every rank shows its *edges*, the last `reach` tokens of each of its chunks, to all
others, and `previous_rows` says where, among a rank's own tokens and the edges of all ranks, the tokens before each
token lie. Chunks may be shorter than the reach: then they are edges as a whole, and so are those before them.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moba_megatron.parallel.layout import shard_positions


def previous_in_pack(num_tokens: int, cu_seqlens: Tensor | None, reach: int, device: torch.device) -> Tensor:
    """Rows of the tokens before each token where one rank holds the whole pack.

    Args:
        cu_seqlens: integer [documents + 1] on `device`, boundaries from 0 to `num_tokens`; None for one document.
        reach: how many tokens back.

    Returns:
        int64 [reach, num_tokens]: in line i the row of the token i + 1 before, -1 where its document has none.

    >>> previous_in_pack(5, torch.tensor([0, 2, 5]), 2, torch.device("cpu")).tolist()
    [[-1, 0, -1, 2, 3], [-1, -1, -1, -1, 2]]
    """
    rows = torch.arange(num_tokens, device=device)
    if cu_seqlens is None:
        starts = torch.zeros_like(rows)
    else:
        cu = cu_seqlens.to(torch.int64)
        starts = cu[torch.searchsorted(cu[1:], rows, right=True).clamp_(max=cu.numel() - 2)]
    before = rows - torch.arange(1, reach + 1, device=device).unsqueeze(1)
    return before.masked_fill_(before < starts, -1)


@functools.lru_cache(maxsize=8)
def edge_rows(boundaries: tuple[int, ...], context_size: int, reach: int) -> Tensor:
    """Rows of a rank's edges among its own tokens, int64, rising; the same on every rank.

    Args:
        boundaries: padded boundaries of the documents of the whole pack.

    >>> edge_rows((0, 12), 2, 2).tolist()
    [1, 2, 4, 5]
    """
    chunks = torch.tensor(boundaries).diff() // (2 * context_size)
    lengths = chunks.repeat_interleave(2)
    ends = lengths.cumsum(0).repeat_interleave(lengths)
    rows = torch.arange(int(lengths.sum()))
    return rows[ends - rows <= reach]


@functools.lru_cache(maxsize=8)
def previous_rows(boundaries: tuple[int, ...], context_size: int, rank: int, reach: int) -> Tensor:
    """Rows of the tokens before each of a rank's tokens, in its own tokens followed by the edges of rank 0, 1, ...

    Args:
        boundaries: as for `edge_rows`.

    Returns:
        int64 [reach, tokens of this rank]: in line i the row of the token i + 1 before, -1 where its document has none.

    One document of 8 tokens on two ranks: rank 1 holds 2 to 5, and what lies before them is rank 0's edge.

    >>> previous_rows((0, 8), 2, 1, 2).tolist()
    [[5, 0, 1, 2], [4, 5, 0, 1]]
    """
    cu = torch.tensor(boundaries)
    positions = [shard_positions(cu, context_size, other) for other in range(context_size)]
    own = positions[rank]
    rows = edge_rows(boundaries, context_size, reach)
    edges = torch.cat([positions[other][rows] for other in range(context_size)])
    row_of = torch.full((boundaries[-1],), -1)
    row_of[edges] = own.numel() + torch.arange(edges.numel())
    row_of[own] = torch.arange(own.numel())
    starts = cu[torch.searchsorted(cu[1:], own, right=True)]
    before = own - torch.arange(1, reach + 1).unsqueeze(1)
    return torch.where(before < starts, -1, row_of[before.clamp(min=0)])
