"""The index: which query rows attend which kv blocks, as entries sorted by kv block.

A stable sort of the entries by kv block (counting sort's order) brings the rows of each kv block together, and its
inverse says where the entries of a row went; both follow from the ids alone, so that the index is the same every time.

An index is of some query heads of one kv head and a range of tokens. `heads_at_once` and `token_ranges` cut them so
that what is kept for each entry fits a workspace, by default a small multiple of one kv head's queries, however many
slots a row has. They look at one kv head only, so that a rank with some of the heads does exactly what a rank with all
of them does.

Legend: T tokens, N query heads, K slots of a row, t tokens of a range, H heads of a range, E entries, at most t H K.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moba_megatron.ops.fragments import Fragment

# By default an index has at most this many entries for each query row of its kv head, so that a buffer of their outputs
# is that many times the size of these queries.
ENTRIES_PER_QUERY_ROW = 2
# Bytes of an entry beside its row of output or dq: log-sum-exp, kv block, place and order.
ENTRY_BYTES = 40


@dataclass(frozen=True)
class Index:
    """The entries of some tokens and heads, sorted by kv block.

    Attributes:
        tokens, heads: whose entries these are, as slices of T and N.
        row_E: int64 [E], query row of each sorted entry.
        place_tHK: int64 [t, H, K], where each row's entries lie in sorted order; E for a slot without a kv block.
        kv_blocks: (first key row, one past the last, first entry, one past the last) of each kv block that is attended
            at all.
    """

    tokens: slice
    heads: slice
    row_E: Tensor
    place_tHK: Tensor
    kv_blocks: list[tuple[int, int, int, int]]

    @property
    def count(self) -> int:
        """E: a buffer of what belongs to entries has one row more, for the slots without a kv block."""
        return self.row_E.numel()


def most_entries(q_TND: Tensor, qheads_per_kvhead: int, workspace_bytes: int | None) -> int:
    """Entries an index may hold: as many as fit a workspace, by default some for each query row of its kv head."""
    if workspace_bytes is None:
        return ENTRIES_PER_QUERY_ROW * q_TND.shape[0] * qheads_per_kvhead
    return workspace_bytes // (q_TND.shape[2] * q_TND.element_size() + ENTRY_BYTES)


def heads_at_once(num_tokens: int, qheads_per_kvhead: int, num_slots: int, most: int) -> int:
    """How many query heads of a kv head, at least one, an index of at most `most` entries may hold for all tokens."""
    return min(qheads_per_kvhead, max(1, most // max(1, num_tokens * num_slots)))


def token_ranges(num_tokens: int, num_heads: int, num_slots: int, most: int) -> Iterator[slice]:
    """Cut the tokens so that an index of `num_heads` query heads has at most `most` entries, or those of one token.

    >>> list(token_ranges(12, 1, 6, 24))
    [slice(0, 4, None), slice(4, 8, None), slice(8, 12, None)]
    """
    step = max(1, most // (num_slots * num_heads))
    for first in range(0, num_tokens, step):
        yield slice(first, min(first + step, num_tokens))


def build_index(ids_TNK: Tensor, tokens: slice, heads: slice, fragment: Fragment) -> Index:
    """Sort the entries of these tokens' queries of these heads by kv block."""
    num_heads, device = ids_TNK.shape[1], ids_TNK.device
    kv_blocks_tHK = fragment.chosen_kv_blocks(ids_TNK, tokens, heads)
    none = len(fragment.kv_blocks)
    key_type = torch.int16 if none < 2**15 else torch.int32
    key_E = torch.where(kv_blocks_tHK < 0, none, kv_blocks_tHK).to(key_type).flatten()
    order_E = torch.argsort(key_E, stable=True)
    place_E = torch.empty_like(order_E)
    place_E[order_E] = torch.arange(order_E.numel(), device=device)
    counts = torch.bincount(key_E, minlength=none + 1).tolist()
    attended, first = [], 0
    for (start, end), count in zip(fragment.kv_blocks, counts[:none], strict=True):
        if count:
            attended.append((start, end, first, first + count))
            first += count
    rows_t1 = torch.arange(tokens.start * num_heads, tokens.stop * num_heads, num_heads, device=device).unsqueeze(1)
    rows_tH = rows_t1 + torch.arange(num_heads, device=device)[heads]
    row_E = rows_tH.flatten()[order_E[:first].div_(kv_blocks_tHK.shape[2], rounding_mode="floor")]
    return Index(tokens, heads, row_E, place_E.clamp_(max=first).view(kv_blocks_tHK.shape), attended)
