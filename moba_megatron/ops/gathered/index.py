"""The index: which query rows attend which kv blocks, as entries sorted by kv block.

A stable sort of the entries by kv block (counting sort's order) brings the rows of each kv block together, and its
inverse says where the entries of a row went; both follow from the ids alone, so that the index is the same every time.
The entries of a kv block fill whole batches of rows: some at its end are padding, repeat a row of the same kv block and
count for nothing. So tiles are plain slices of what belongs to entries.

An index is of some kv heads with their query heads, or some query heads of one, and a range of tokens. What is kept for
each entry fits a workspace, by default a small multiple of one kv head's queries, however many slots a row has. Ranges
of tokens and parts of a kv head follow from the sizes of one kv head alone, so that a rank with some of the heads does
exactly what a rank with all of them does.

Legend: T tokens, N query heads, K slots of a row, t tokens of a range, H heads of a range, E entries, at most t H K, P
entries with padding, U kv blocks of a kv head, S its keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moba_megatron.ops.fragments import Fragment

# By default an index has at most this many entries for each query row of its kv head, so that a buffer of their outputs
# is that many times the size of these queries,
ENTRIES_PER_QUERY_ROW = 2
# and in short texts this many: with fewer, calls would cost more than the products in them.
FEWEST_ENTRIES = 2**17
# Bytes of an entry beside its row of output or dq: log-sum-exp, delta, row, place, order and kv block.
ENTRY_BYTES = 48
# Entries with padding, in terms of entries, at most; ROWS_OF_BATCH and fewer see to that.
PADDING = 1.5
# Query rows of a batch: fewer leave less room unused, more make products longer.
ROWS_OF_BATCH, FEWEST_ROWS = 64, 8


@dataclass(frozen=True)
class Index:
    """The entries of some tokens and heads, sorted by kv block.

    Attributes:
        tokens, heads: whose entries these are, as slices of T and N.
        row_P: int64 [P], query row (of T x N) of each sorted entry.
        place_tHK: int64 [t, H, K], where each row's entries lie in sorted order; P for a slot without a kv block.
        padding: int64, the padding entries.
        rows: query rows of a batch; every kv block has whole batches.
        kv_blocks: (first key row, one past the last, first entry, one past the last) of each kv block that is attended
            at all; key rows count through all kv heads.
    """

    tokens: slice
    heads: slice
    row_P: Tensor
    place_tHK: Tensor
    padding: Tensor
    rows: int
    kv_blocks: list[tuple[int, int, int, int]]

    @property
    def count(self) -> int:
        """P: a buffer of what belongs to entries has one row more, for the slots without a kv block."""
        return self.row_P.numel()


def most_entries(q_TND: Tensor, qheads_per_kvhead: int, workspace_bytes: int | None) -> int:
    """Entries an index may hold: as many as fit a workspace, by default some for each query row of its kv head."""
    if workspace_bytes is None:
        return default_entries(q_TND.shape[0] * qheads_per_kvhead)
    return int(workspace_bytes / PADDING) // (q_TND.shape[2] * q_TND.element_size() + ENTRY_BYTES)


def default_entries(query_rows: int) -> int:
    """Entries an index may hold where nobody sets a workspace, for so many query rows of a kv head."""
    return max(FEWEST_ENTRIES, ENTRIES_PER_QUERY_ROW * query_rows)


def heads_at_once(num_tokens: int, qheads_per_kvhead: int, num_slots: int, most: int) -> int:
    """How many query heads of a kv head, at least one, an index of at most `most` entries may hold for all tokens."""
    return min(qheads_per_kvhead, max(1, most // max(1, num_tokens * num_slots)))


def kv_heads_at_once(num_tokens: int, qheads_per_kvhead: int, num_slots: int, most: int) -> int:
    """How many kv heads, at least one, an index of at most `most` entries may hold with all query heads and tokens."""
    return max(1, most // max(1, num_tokens * num_slots * qheads_per_kvhead)) if num_slots else 1


def token_ranges(num_tokens: int, num_heads: int, num_slots: int, most: int) -> Iterator[slice]:
    """Cut the tokens so that an index of `num_heads` query heads has at most `most` entries, or those of one token.

    >>> list(token_ranges(12, 1, 6, 24))
    [slice(0, 4, None), slice(4, 8, None), slice(8, 12, None)]
    """
    step = max(1, most // (num_slots * num_heads))
    for first in range(0, num_tokens, step):
        yield slice(first, min(first + step, num_tokens))


def build_index(
    ids_TNK: Tensor, tokens: slice, heads: slice, fragment: Fragment, qheads_per_kvhead: int, num_keys: int
) -> Index:
    """Sort the entries of these tokens' queries of these heads by kv block.

    Args:
        qheads_per_kvhead: query heads that share a kv head, the first with the first of `heads`.
        num_keys: S.
    """
    num_heads, device = heads.stop - heads.start, ids_TNK.device
    chosen_tHK = fragment.chosen_kv_blocks(ids_TNK, tokens, heads)
    kv_blocks = [
        (start + shift, end + shift)
        for shift in _shifts(num_heads, qheads_per_kvhead, num_keys)
        for start, end in fragment.kv_blocks
    ]
    none = len(kv_blocks)
    shift_H = torch.arange(num_heads, device=device, dtype=torch.int32) // qheads_per_kvhead * len(fragment.kv_blocks)
    key_E = torch.where(chosen_tHK < 0, none, chosen_tHK + shift_H.unsqueeze(1)).flatten()
    if none < 2**15:
        key_E = key_E.to(torch.int16)
    count_U = torch.bincount(key_E, minlength=none + 1)[:none]
    counts = count_U.tolist()
    entries = sum(counts)
    order_E = torch.argsort(key_E, stable=True)[:entries]
    rows = _rows_of_batch(entries, sum(count > 0 for count in counts))
    attended, place = [], 0
    for (start, end), count in zip(kv_blocks, counts, strict=True):
        if count:
            first, place = place, place + -(-count // rows) * rows
            attended.append((start, end, first, place))
    padding_U = -count_U % rows
    shift_U = padding_U.cumsum(0) - padding_U
    place_E = torch.arange(entries, device=device) + torch.repeat_interleave(shift_U, count_U, output_size=entries)
    place_tHK = torch.full_like(chosen_tHK, place, dtype=torch.int64)
    place_tHK.view(-1)[order_E] = place_E
    # Among the t x H rows of these tokens and heads, then among the T x N of all.
    position_E = order_E.div_(chosen_tHK.shape[2], rounding_mode="floor")
    row_E = (position_E // num_heads + tokens.start) * ids_TNK.shape[1] + position_E % num_heads + heads.start
    row_P = row_E.new_full((place,), -1)
    row_P[place_E] = row_E
    is_padding_P = row_P < 0
    # Padding follows the entries of its kv block and repeats the last of them.
    last_entry_P = torch.arange(place, device=device).masked_fill_(is_padding_P, 0).cummax(0).values
    padding = is_padding_P.nonzero().squeeze(1)
    return Index(tokens, heads, row_P[last_entry_P], place_tHK, padding, rows, attended)


def _shifts(num_heads: int, qheads_per_kvhead: int, num_keys: int) -> range:
    """The first key row of each kv head of these query heads."""
    return range(0, -(num_heads // -qheads_per_kvhead) * num_keys, num_keys)


def _rows_of_batch(entries: int, kv_blocks: int) -> int:
    """Rows of a batch: so few that a batch of padding for each kv block is at most half of the entries.

    >>> _rows_of_batch(22000, 100), _rows_of_batch(5000, 100), _rows_of_batch(5, 4)
    (64, 16, 8)
    """
    rows = ROWS_OF_BATCH
    while rows > FEWEST_ROWS and 2 * rows * kv_blocks > entries:
        rows //= 2
    return rows
