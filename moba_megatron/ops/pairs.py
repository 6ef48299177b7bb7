"""Counting pairs: how many keys queries attend, and how many block summaries they are scored against."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def attended_pairs(
    length: int, block_size: int | None = None, top_k: int | Sequence[int] | None = None
) -> int | Fraction:
    """Query-key pairs of one document of `length` tokens for one head; without block size: full causal attention.

    A query at position t attends min(top_k - 1, past blocks) * block_size + (t mod block_size) + 1 keys. Of several K
    this is the mean.

    >>> attended_pairs(4), attended_pairs(4, block_size=2, top_k=1)
    (10, 6)
    """
    if block_size is None or top_k is None:
        return length * (length + 1) // 2
    whole, tail = divmod(length, block_size)
    own = whole * block_size * (block_size + 1) // 2 + tail * (tail + 1) // 2
    return own + (chosen_blocks(length, block_size, top_k)) * block_size


def chosen_blocks(length: int, block_size: int, top_k: int | Sequence[int]) -> int | Fraction:
    """(Query, past block) pairs of one document that one head attends; of several K the mean."""
    if not isinstance(top_k, int):
        return Fraction(sum(chosen_blocks(length, block_size, number) for number in top_k), len(top_k))
    whole, tail = divmod(length, block_size)
    rising = min(top_k - 1, whole)
    full_rows = rising * (rising - 1) // 2 + (whole - rising) * rising
    return full_rows * block_size + min(top_k - 1, whole) * tail


def scored_pairs(length: int, block_size: int) -> int:
    """(Query, past block) pairs of one document that one head scores.

    >>> scored_pairs(5, 2), chosen_blocks(5, 2, 2)
    (4, 3)
    """
    whole, tail = divmod(length, block_size)
    return whole * (whole - 1) // 2 * block_size + whole * tail
