"""The work list of units: which query rows attend which keys.

An *entry* is one (query row, unit of keys, see `fragments`), where a query row is token * N + head. A stable sort of
the entries by unit (counting sort's order) lists the rows of each unit together, and its inverse says where the entries
of a row went; both follow from the ids alone, so that the list is the same every time.

A work list holds some query heads of one key head and a range of tokens. `heads_at_once` and `token_ranges` cut them so
that what is kept for each entry fits a workspace, by default a small multiple of one key head's queries, however many
units a query has. They look at one key head only, so that a rank with some of the heads does exactly what a rank with
all of them does.

Legend: T tokens, N query heads, K units per query, t tokens of a range, H heads of a list, E entries, at most t H K.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moba_megatron.ops.fragments import Fragment

# By default a list has at most this many entries for each query row of its key head, so that a buffer of their outputs
# is that many times the size of these queries.
ENTRIES_PER_QUERY_ROW = 2
# Bytes of an entry beside its row of output or dq: log-sum-exp, unit, place and order.
ENTRY_BYTES = 40


@dataclass(frozen=True)
class Entries:
    """The (query row, unit) pairs of some tokens and heads, sorted by unit.

    Attributes:
        tokens, heads: whose pairs these are, as slices of T and N.
        row_E: int64 [E], query row of each sorted entry.
        place_tHK: int64 [t, H, K], where each query's entries lie in sorted order; E for a pair without a unit.
        units: (first key row, one past the last, first entry, one past the last) of each unit that is attended at all.
    """

    tokens: slice
    heads: slice
    row_E: Tensor
    place_tHK: Tensor
    units: list[tuple[int, int, int, int]]

    @property
    def count(self) -> int:
        """E: a buffer of what belongs to entries has one row more, for the pairs without a unit."""
        return self.row_E.numel()


def most_entries(q_TND: Tensor, group_size: int, workspace_bytes: int | None) -> int:
    """Entries a list may hold: as many as fit a workspace, by default some for each query row of its key head."""
    if workspace_bytes is None:
        return ENTRIES_PER_QUERY_ROW * q_TND.shape[0] * group_size
    return workspace_bytes // (q_TND.shape[2] * q_TND.element_size() + ENTRY_BYTES)


def heads_at_once(num_tokens: int, group_size: int, per_query: int, most: int) -> int:
    """How many query heads of a key head, at least one, a list of at most `most` entries may hold for all tokens."""
    return min(group_size, max(1, most // max(1, num_tokens * per_query)))


def token_ranges(num_tokens: int, num_heads: int, per_query: int, most: int) -> Iterator[slice]:
    """Cut the tokens so that a list of `num_heads` query heads has at most `most` entries, or those of one token.

    >>> list(token_ranges(12, 1, 6, 24))
    [slice(0, 4, None), slice(4, 8, None), slice(8, 12, None)]
    """
    step = max(1, most // (per_query * num_heads))
    for first in range(0, num_tokens, step):
        yield slice(first, min(first + step, num_tokens))


def sort_entries(ids_TNK: Tensor, tokens: slice, heads: slice, fragment: Fragment) -> Entries:
    """List the rows of each unit that these tokens' queries of these heads attend."""
    num_heads, device = ids_TNK.shape[1], ids_TNK.device
    units_tHK = fragment.chosen_units(ids_TNK, tokens, heads)
    none = len(fragment.units)
    key_type = torch.int16 if none < 2**15 else torch.int32
    key_E = torch.where(units_tHK < 0, none, units_tHK).to(key_type).flatten()
    order_E = torch.argsort(key_E, stable=True)
    place_E = torch.empty_like(order_E)
    place_E[order_E] = torch.arange(order_E.numel(), device=device)
    counts = torch.bincount(key_E, minlength=none + 1).tolist()
    units, first = [], 0
    for (start, end), count in zip(fragment.units, counts[:none], strict=True):
        if count:
            units.append((start, end, first, first + count))
            first += count
    rows_t1 = torch.arange(tokens.start * num_heads, tokens.stop * num_heads, num_heads, device=device).unsqueeze(1)
    rows_tH = rows_t1 + torch.arange(num_heads, device=device)[heads]
    row_E = rows_tH.flatten()[order_E[:first].div_(units_tHK.shape[2], rounding_mode="floor")]
    return Entries(tokens, heads, row_E, place_E.clamp_(max=first).view(units_tHK.shape), units)
