"""The work list of past blocks: which query rows attend which block.

An *entry* is one (query row, chosen block), where a query row is token * N + head. A stable sort of the entries by
block (counting sort's order) lists the rows of each block together, and its inverse says where the entries of a row
went; both follow from the ids alone, so that the list is the same every time.

A work list holds some query heads of one key head and a range of tokens. `token_ranges` cuts the tokens so that what is
kept for each entry stays a small multiple of the queries, however many blocks a query has.

Legend: T tokens, N query heads, K past blocks per query, t tokens of a range, H heads of a list, E = t H K entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moba_megatron.ops.layout import BlockLayout

# A list has at most this many entries for each row of q, so that a buffer of their outputs is that many times q's size.
ENTRIES_PER_QUERY_ROW = 2


@dataclass(frozen=True)
class Entries:
    """The (query row, past block) pairs of some tokens and heads, sorted by block.

    Attributes:
        tokens, heads: whose pairs these are, as slices of T and N.
        row_E: int64 [E], query row of each sorted entry; pairs without a block come last.
        place_tHK: int64 [t, H, K], where each query's entries lie in sorted order.
        blocks: (first key token, first entry, one past the last entry) of each block that is chosen at all.
        count: entries that have a block.
    """

    tokens: slice
    heads: slice
    row_E: Tensor
    place_tHK: Tensor
    blocks: list[tuple[int, int, int]]
    count: int


def heads_at_once(num_heads: int, group_size: int, num_past: int) -> int:
    """How many query heads of a key head, at least one, a list may hold for all tokens."""
    return min(group_size, max(1, ENTRIES_PER_QUERY_ROW * num_heads // max(1, num_past)))


def token_ranges(num_tokens: int, num_heads: int, heads: slice, num_past: int) -> Iterator[slice]:
    """Cut the tokens so that each list stays within its entries.

    >>> list(token_ranges(10, 1, slice(0, 1), 5))
    [slice(0, 4, None), slice(4, 8, None), slice(8, 10, None)]
    """
    entries_per_token = num_past * (heads.stop - heads.start)
    step = max(1, ENTRIES_PER_QUERY_ROW * num_tokens * num_heads // entries_per_token)
    for first in range(0, num_tokens, step):
        yield slice(first, min(first + step, num_tokens))


def sort_entries(ids_TNK: Tensor, tokens: slice, heads: slice, layout: BlockLayout) -> Entries:
    """List the rows of each past block that these tokens' queries of these heads chose."""
    num_heads, device = ids_TNK.shape[1], ids_TNK.device
    ids_tHK = ids_TNK[tokens, heads]
    none = layout.num_blocks
    key_type = torch.int16 if none < 2**15 else torch.int32
    pack_tHK = torch.where(ids_tHK < 0, none, ids_tHK + layout.first_block_T[tokens].to(torch.int32).view(-1, 1, 1))
    key_E = pack_tHK.to(key_type).flatten()
    order_E = torch.argsort(key_E, stable=True)
    place_E = torch.empty_like(order_E)
    place_E[order_E] = torch.arange(order_E.numel(), device=device)
    counts = torch.bincount(key_E, minlength=none + 1).tolist()
    blocks, first = [], 0
    for start, count in zip(layout.block_starts().tolist(), counts[:none], strict=True):
        if count:
            blocks.append((start, first, first + count))
            first += count
    rows_t1 = torch.arange(tokens.start * num_heads, tokens.stop * num_heads, num_heads, device=device).unsqueeze(1)
    rows_tH = rows_t1 + torch.arange(num_heads, device=device)[heads]
    row_E = rows_tH.flatten()[order_E.div_(ids_tHK.shape[2], rounding_mode="floor")]
    return Entries(tokens, heads, row_E, place_E.view(ids_tHK.shape), blocks, first)
