"""Splits: the entries of head blocks, or the rows of spans, cut into pieces of a fixed size, a program's work each.

A program of these kernels takes a tile of head blocks (or spans), adds up what lies before it by itself, and writes
where its own begin and which splits they have: one launch, in which no program waits for another. Launches over splits
are sized for the worst case; the surplus belongs to nobody.

Traffic: each program reads all counts, 4 bytes a head block (with partial sums 20), from cache; 4 bytes (12) a split
written.

Legend: L head blocks or spans.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_megatron.ops.triton import config
from moba_megatron.ops.triton.common import COUNTS, quotient
from moba_megatron.ops.triton.fragments import Spans


@triton.jit
def _number_of_splits(count, split_size):
    return quotient(count + (split_size - 1), split_size)


@triton.jit
def _write_splits(
    split_of_ptr, cu_splits_ptr, before, total, count, split_size, number, num_owners, num_splits, BLOCK_S: tl.constexpr
):
    """Write the splits of a tile of owners, and this program's part of the surplus.

    Args:
        before, total: splits of all owners before the tile, and of all.
        count, number: entries or rows of each owner of the tile, and the owners' numbers.

    Returns:
        the first split of each owner, and one past its last.
    """
    splits = _number_of_splits(count, split_size)
    ends = before + tl.cumsum(splits, 0)
    starts = ends - splits
    tl.store(cu_splits_ptr + number + 1, ends.to(tl.int64), mask=number < num_owners)
    tl.store(cu_splits_ptr, tl.full([], 0, tl.int64), mask=tl.program_id(0) == 0)
    last = tl.max(ends, axis=0)
    for low in range(before, last, BLOCK_S):
        split = low + tl.arange(0, BLOCK_S)
        mine = (starts[None, :] <= split[:, None]) & (split[:, None] < ends[None, :])
        owner = tl.sum(tl.where(mine, number[None, :], 0), axis=1)
        tl.store(split_of_ptr + split, owner, mask=split < last)
    for low in range(total + tl.program_id(0) * BLOCK_S, num_splits, tl.num_programs(0) * BLOCK_S):
        split = low + tl.arange(0, BLOCK_S)
        tl.store(split_of_ptr + split, tl.zeros([BLOCK_S], dtype=tl.int32) + num_owners, mask=split < num_splits)
    return starts, ends


@triton.jit(do_not_specialize=COUNTS)
def split_entries(
    totals_ptr,
    kv_block_start_ptr,
    kv_block_end_ptr,
    cu_entries_ptr,
    split_of_ptr,
    cu_splits_ptr,
    partial_start_ptr,
    other_split_of_ptr,
    other_cu_splits_ptr,
    num_head_blocks,
    num_kv_blocks,
    num_splits,
    split_size,
    other_num_splits,
    other_split_size,
    SUMS: tl.constexpr,
    OTHER: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program per tile of BLOCK_L head blocks: where their entries begin in the index, and their splits.

    With `SUMS` also where the partial sums of each split begin, a row for each key of its kv block; with `OTHER`
    splits of another size as well.
    """
    first = tl.program_id(0) * BLOCK_L
    entries = tl.zeros([BLOCK_E], dtype=tl.int32)
    before = tl.zeros([BLOCK_E], dtype=tl.int32)
    total = tl.zeros([BLOCK_E], dtype=tl.int32)
    other_before = tl.zeros([BLOCK_E], dtype=tl.int32)
    other_total = tl.zeros([BLOCK_E], dtype=tl.int32)
    rows = tl.zeros([BLOCK_E], dtype=tl.int64)
    for low in range(0, num_head_blocks, BLOCK_E):
        number = low + tl.arange(0, BLOCK_E)
        count = tl.load(totals_ptr + number, mask=number < num_head_blocks, other=0)
        earlier = number < first
        entries += tl.where(earlier, count, 0)
        splits = _number_of_splits(count, split_size)
        before += tl.where(earlier, splits, 0)
        total += splits
        if SUMS:
            start = tl.load(kv_block_start_ptr + number % num_kv_blocks, mask=earlier, other=0)
            end = tl.load(kv_block_end_ptr + number % num_kv_blocks, mask=earlier, other=0)
            rows += splits * (end - start)
        if OTHER:
            splits = _number_of_splits(count, other_split_size)
            other_before += tl.where(earlier, splits, 0)
            other_total += splits
    number = first + tl.arange(0, BLOCK_L)
    inside = number < num_head_blocks
    count = tl.load(totals_ptr + number, mask=inside, other=0)
    tl.store(cu_entries_ptr + number + 1, tl.sum(entries, axis=0) + tl.cumsum(count, 0), mask=inside)
    tl.store(cu_entries_ptr, 0, mask=first == 0)
    starts, ends = _write_splits(
        split_of_ptr, cu_splits_ptr, tl.sum(before, axis=0), tl.sum(total, axis=0), count, split_size, number,
        num_head_blocks, num_splits, BLOCK_S,
    )  # fmt: skip
    if SUMS:
        start = tl.load(kv_block_start_ptr + number % num_kv_blocks, mask=inside, other=0)
        length = tl.load(kv_block_end_ptr + number % num_kv_blocks, mask=inside, other=0) - start
        own_rows = (ends - starts) * length
        row_starts = tl.sum(rows, axis=0) + tl.cumsum(own_rows, 0) - own_rows
        last = tl.max(ends, axis=0)
        for low in range(tl.min(starts, axis=0), last, BLOCK_S):
            split = low + tl.arange(0, BLOCK_S)
            mine = (starts[None, :] <= split[:, None]) & (split[:, None] < ends[None, :])
            row = row_starts[None, :] + (split[:, None] - starts[None, :]) * length[None, :]
            tl.store(partial_start_ptr + split, tl.sum(tl.where(mine, row, 0), axis=1), mask=split < last)
    if OTHER:
        _write_splits(
            other_split_of_ptr, other_cu_splits_ptr, tl.sum(other_before, axis=0), tl.sum(other_total, axis=0), count,
            other_split_size, number, num_head_blocks, other_num_splits, BLOCK_S,
        )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def split_spans(
    span_start_ptr,
    span_end_ptr,
    split_of_ptr,
    cu_splits_ptr,
    num_spans,
    num_splits,
    split_size,
    rows_per_token,
    BLOCK_E: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program per tile of BLOCK_L spans: their splits."""
    first = tl.program_id(0) * BLOCK_L
    before = tl.zeros([BLOCK_E], dtype=tl.int32)
    total = tl.zeros([BLOCK_E], dtype=tl.int32)
    for low in range(0, num_spans, BLOCK_E):
        number = low + tl.arange(0, BLOCK_E)
        inside = number < num_spans
        length = tl.load(span_end_ptr + number, mask=inside, other=0) - tl.load(
            span_start_ptr + number, mask=inside, other=0
        )
        splits = _number_of_splits(length.to(tl.int32) * rows_per_token, split_size)
        before += tl.where(number < first, splits, 0)
        total += splits
    number = first + tl.arange(0, BLOCK_L)
    inside = number < num_spans
    length = tl.load(span_end_ptr + number, mask=inside, other=0) - tl.load(
        span_start_ptr + number, mask=inside, other=0
    )
    _write_splits(
        split_of_ptr, cu_splits_ptr, tl.sum(before, axis=0), tl.sum(total, axis=0),
        length.to(tl.int32) * rows_per_token, split_size, number, num_spans, num_splits, BLOCK_S,
    )  # fmt: skip


@dataclass(frozen=True)
class Splits:
    """The entries of L head blocks, or the rows of L spans, cut in order: split i belongs to `split_of[i]`
    and begins at its entry or row (i - cu_splits[split_of[i]]) * size.

    Attributes:
        split_of: int32 [splits], head block or span of each split; L for surplus splits.
        cu_splits: int64 [L + 1], number of the first split of each; the last is the true number of splits.
        size: entries or rows of a split, at most.
    """

    split_of: Tensor
    cu_splits: Tensor
    size: int

    @property
    def count(self) -> int:
        """Splits to launch, surplus ones included."""
        return self.split_of.numel()


def room_for_splits(owners: int, size: int, total: int, device: torch.device) -> Splits:
    """Uninitialised splits of at most `total` entries or rows of so many owners.

    n entries are cut into at most n // size + 1 splits, and never into more splits than entries.
    """
    count = min(total, total // size + owners)
    split_of = torch.empty(count, dtype=torch.int32, device=device)
    return Splits(split_of, torch.empty(owners + 1, dtype=torch.int64, device=device), size)


def cut_spans(spans: Spans, size: int, rows_per_token: int = 1) -> Splits:
    """Splits of the rows of each span: `rows_per_token` for each of its tokens. Made once for these spans and sizes."""
    if (size, rows_per_token) not in spans.cuts:
        spans.cuts[size, rows_per_token] = _cut_spans(spans, size, rows_per_token)
    return spans.cuts[size, rows_per_token]


def _cut_spans(spans: Spans, size: int, rows_per_token: int) -> Splits:
    splits = room_for_splits(spans.count, size, spans.total * rows_per_token, spans.start.device)
    if splits.count:
        tiles = config.tiles("split_spans")
        split_spans[(triton.cdiv(spans.count, tiles["BLOCK_L"]),)](
            spans.start, spans.end, splits.split_of, splits.cu_splits, spans.count, splits.count, size, rows_per_token,
            **tiles,
        )  # fmt: skip
    return splits
