"""Which tokens of a pack a context-parallel rank holds: the zigzag layout, as integer arithmetic.

A document of L tokens is cut into 2 C equal chunks, and rank r of C holds chunks r and 2 C - 1 - r of every document,
one document after the other. Early chunks have little to look back on and late ones much, so every pair costs the same.
For documents of one length this is megatron-core's `get_batch_on_this_cp_rank`; for packs it is what Transformer Engine
calls the thd layout. L must be a multiple of 2 C, so documents are padded at their end (`padded_boundaries`): padding
comes after its document's tokens, which therefore never attend to it.

The tokens of a rank are in rising order of their position in the pack, always. Nothing here communicates, and every
rank can compute what any other holds.
"""

from __future__ import annotations

import torch
from torch import Tensor


def padded_boundaries(cu_seqlens: Tensor, context_size: int, *, total_multiple: int = 1) -> Tensor:
    """Boundaries of the documents once each is padded to a multiple of 2 C.

    Args:
        cu_seqlens: integer [documents + 1], true boundaries.
        context_size: C; nothing is padded at 1, but for `total_multiple`.
        total_multiple: the last document is padded further, until each rank's tokens are a multiple of this (the
            tensor-parallel size under sequence parallelism).

    Returns:
        Boundaries of the same shape and dtype. Empty documents stay empty.

    >>> padded_boundaries(torch.tensor([0, 5, 5, 9]), 2).tolist()
    [0, 8, 8, 12]
    >>> padded_boundaries(torch.tensor([0, 5, 5, 9]), 2, total_multiple=4).tolist()
    [0, 8, 8, 16]
    """
    multiple = 2 * context_size if context_size > 1 else 1
    lengths = cu_seqlens.diff()
    lengths = (lengths + multiple - 1) // multiple * multiple
    whole = context_size * total_multiple
    # Both numbers have to divide the total: every document keeps to `multiple`, the last one makes up the rest.
    step = torch.lcm(torch.tensor(multiple), torch.tensor(whole)).to(lengths)
    lengths[-1] += -lengths.sum() % step
    return torch.cat([cu_seqlens[:1], lengths.cumsum(0).to(cu_seqlens.dtype)])


def shard_positions(cu_seqlens: Tensor, context_size: int, rank: int) -> Tensor:
    """Positions in the pack of the tokens that a rank holds.

    Args:
        cu_seqlens: integer [documents + 1], padded boundaries.
        context_size: C.
        rank: 0 to C - 1.

    Returns:
        int64 [T / C], rising.

    Raises:
        ValueError: a document whose length is not a multiple of 2 C, or a rank out of range.

    >>> shard_positions(torch.tensor([0, 8, 12]), 2, 0).tolist()
    [0, 1, 6, 7, 8, 11]
    """
    if not 0 <= rank < context_size:
        raise ValueError(f"context-parallel rank {rank} is not within 0 to {context_size - 1}")
    cu = cu_seqlens.to(torch.int64)
    if context_size == 1:
        return torch.arange(int(cu[-1]), device=cu.device)
    check_divisible(cu, context_size)
    chunks = cu.diff() // (2 * context_size)
    starts = torch.stack([cu[:-1] + rank * chunks, cu[:-1] + (2 * context_size - 1 - rank) * chunks], dim=1).flatten()
    lengths = chunks.repeat_interleave(2)
    first_row = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum()), device=cu.device) + (starts - first_row).repeat_interleave(lengths)


def check_divisible(cu_seqlens: Tensor, context_size: int) -> None:
    """Raise ValueError, with the document, its length and the next length that fits, where one is not a multiple of
    2 C."""
    multiple = 2 * context_size
    lengths = cu_seqlens.diff()
    wrong = torch.nonzero(lengths % multiple).flatten()
    if wrong.numel():
        number, length = int(wrong[0]), int(lengths[wrong[0]])
        raise ValueError(
            f"document {number} of the pack has {length} tokens, not a multiple of 2 x context-parallel size = "
            f"{multiple}: pad it to {-(-length // multiple) * multiple} "
            "(moba_megatron.parallel.layout.padded_boundaries)"
        )


def check_positions(position_ids: Tensor, cu_seqlens: Tensor, context_size: int, rank: int) -> None:
    """Compare the positions that came with a batch with the layout that attention will assume.

    A batch cut in another way (contiguously, or a pack cut as one sequence) has the right shape and gives wrong
    attention without an error; its positions tell.

    Args:
        position_ids: integer [T / C], position of each token within its document.
        cu_seqlens: padded boundaries of the whole pack.

    Raises:
        ValueError: positions that are not those of this rank's zigzag shard.
    """
    positions = shard_positions(cu_seqlens, context_size, rank)
    cu = cu_seqlens.to(torch.int64)
    document = torch.searchsorted(cu[1:], positions, right=True)
    expected = positions - cu[document]
    if position_ids.shape != expected.shape:
        raise ValueError(
            f"{position_ids.numel()} tokens on context-parallel rank {rank} of {context_size}, but documents of "
            f"{int(cu[-1])} tokens in all put {expected.numel()} there"
        )
    wrong = torch.nonzero(position_ids != expected).flatten()
    if wrong.numel():
        at = int(wrong[0])
        raise ValueError(
            f"the batch is not in zigzag layout: token {at} of context-parallel rank {rank} of {context_size} has "
            f"position {int(position_ids[at])} in its document, expected {int(expected[at])}; cut batches by "
            "moba_megatron.parallel.layout.shard_positions"
        )
