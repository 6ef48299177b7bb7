"""The index: entries sorted by (kv head, kv block), made on the device by counting, one prefix sum and a scatter.

The rows of a pass are numbered kv head by kv head, token by token, head by head, and an entry by row * num_slots +
slot. The number says which row to gather and where its partial result goes, so that partial results of a row lie
together. Entries are cut into chunks of equal size; each chunk counts its entries of each head block, a prefix
sum over these and the chunks tells every chunk where its entries begin, and a second walk puts them there: in rising
order within each kv block, whatever ran first. Counting uses integer atomics, whose sum does not depend on their order.
Nothing waits for the host: launches are sized for the worst case, and surplus programs return at once.

Traffic per entry: 4 bytes of ids, 8 of kv blocks, 4 of order; the counts take L x chunks x 8 bytes.

Legend: T tokens, N query heads, K ids per query, E entries of a pass, attended or not, L head blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_megatron.ops.triton import config
from moba_megatron.ops.triton.common import COUNTS, query_rows, quotient
from moba_megatron.ops.triton.fragments import DeviceFragment, Spans
from moba_megatron.ops.triton.passes import Pass


@triton.jit(do_not_specialize=COUNTS)
def count_entries(
    ids_ptr,
    first_block_ptr,
    kv_block_of_block_ptr,
    own_kv_block_ptr,
    entry_kv_block_ptr,
    counts_ptr,
    first_token,
    num_tokens,
    first_kv_head,
    num_heads,
    num_past,
    num_slots,
    num_kv_blocks,
    num_chunks,
    chunk_size,
    qheads_per_kvhead,
    HAS_FIRST: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_OWN: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program per (chunk, kv head): translates ids to kv blocks and counts the entries of each."""
    chunk, kv_head = tl.program_id(0), tl.program_id(1)
    num_entries = num_tokens * qheads_per_kvhead * num_slots
    origin = first_token.to(tl.int64) * num_heads + (first_kv_head + kv_head) * qheads_per_kvhead
    low = chunk * chunk_size
    high = tl.minimum(low + chunk_size, num_entries)
    for first in range(low, high, BLOCK_E):
        entry = first + tl.arange(0, BLOCK_E)
        inside = entry < high
        offs_m = quotient(entry, num_slots)
        slot = entry - offs_m * num_slots
        position = quotient(offs_m, qheads_per_kvhead)
        token = first_token + position
        picked = inside & (slot < num_past)
        row = query_rows(origin, offs_m, position, num_heads, qheads_per_kvhead)
        kv_block = tl.load(ids_ptr + row * num_past + slot, mask=picked, other=-1)
        if HAS_FIRST:
            picked = picked & (kv_block >= 0)
            number = kv_block + tl.load(first_block_ptr + token, mask=picked, other=0).to(tl.int32)
            if HAS_TABLE:
                number = tl.load(kv_block_of_block_ptr + number, mask=picked, other=-1)
            kv_block = tl.where(picked, number, -1)
        if HAS_OWN:
            own = inside & (slot == num_past)
            kv_block = tl.where(own, tl.load(own_kv_block_ptr + token, mask=own, other=-1), kv_block)
        tl.store(entry_kv_block_ptr + kv_head.to(tl.int64) * num_entries + entry, kv_block, mask=inside)
        count = (kv_head.to(tl.int64) * num_kv_blocks + kv_block) * num_chunks + chunk
        tl.atomic_add(counts_ptr + count, 1, mask=inside & (kv_block >= 0), sem="relaxed")


@triton.jit(do_not_specialize=COUNTS)
def scatter_entries(
    entry_kv_block_ptr,
    offsets_ptr,
    order_ptr,
    num_entries,
    num_kv_blocks,
    num_chunks,
    chunk_size,
    BLOCK_E: tl.constexpr,
):
    """One program per (chunk, kv head): puts the chunk's entries where those of their kv block lie, in rising order."""
    chunk, kv_head = tl.program_id(0), tl.program_id(1)
    low = chunk * chunk_size
    high = tl.minimum(low + chunk_size, num_entries)
    place = tl.arange(0, BLOCK_E)
    for first in range(low, high, BLOCK_E):
        entry = first + place
        kv_block = tl.load(entry_kv_block_ptr + kv_head.to(tl.int64) * num_entries + entry, mask=entry < high, other=-1)
        attended = kv_block >= 0
        same = kv_block[:, None] == kv_block[None, :]
        before = tl.sum((same & (place[None, :] < place[:, None])).to(tl.int32), axis=1)
        last = tl.sum(same.to(tl.int32), axis=1) == before + 1
        offset_ptr = offsets_ptr + (kv_head.to(tl.int64) * num_kv_blocks + kv_block) * num_chunks + chunk
        target = tl.load(offset_ptr, mask=attended, other=0) + before
        tl.store(order_ptr + target, (kv_head * num_entries + entry).to(tl.int32), mask=attended)
        # All of a tile's loads come before its stores, and these before the next tile's loads.
        tl.debug_barrier()
        tl.store(offset_ptr, target + 1, mask=attended & last)
        tl.debug_barrier()


@triton.jit
def entries_of_split(split, head_block, cu_entries_ptr, cu_splits_ptr, split_size):
    """(first, one past the last) place in `order` of a split of the entries of a head block."""
    low = tl.load(cu_entries_ptr + head_block) + (split - tl.load(cu_splits_ptr + head_block)).to(tl.int32) * split_size
    return low, tl.minimum(low + split_size, tl.load(cu_entries_ptr + head_block + 1))


@triton.jit
def rows_of_entries(entry, kv_head, num_slots, first_token, num_tokens, first_kv_head, num_heads, qheads_per_kvhead):
    """Query rows of entries of one kv head of a pass."""
    offs_m = quotient(entry, num_slots)
    origin = (first_token - kv_head * num_tokens).to(tl.int64) * num_heads + (
        first_kv_head + kv_head
    ) * qheads_per_kvhead
    return query_rows(origin, offs_m, quotient(offs_m, qheads_per_kvhead), num_heads, qheads_per_kvhead)


@dataclass(frozen=True)
class Index:
    """Entries of a pass, sorted by (kv head, kv block).

    Attributes:
        work: the pass.
        num_kv_blocks: of a kv head.
        entry_kv_blocks: int32 [E], the kv block of each entry, -1 for none.
        order: int32 [E], the attended entries sorted; what lies past them is undefined.
        cu_entries: int32 [L + 1], where the entries of each head block begin in `order`.
    """

    work: Pass
    num_kv_blocks: int
    entry_kv_blocks: Tensor
    order: Tensor
    cu_entries: Tensor

    @property
    def num_head_blocks(self) -> int:
        """L."""
        return self.cu_entries.numel() - 1


def build_index(work: Pass, ids_TNK: Tensor, fragment: DeviceFragment) -> Index:
    """Sort the entries of a pass by (kv head, kv block), in rising order; no host synchronisation.

    Args:
        ids_TNK: contiguous int32 [T, N, K], block numbers within the document (numbers of kv blocks where the fragment
            has no `first_block_T`), -1 for none, none twice in a row.
    """
    device, num_kv_blocks = ids_TNK.device, fragment.kv_blocks.count
    entries_per_kv_head = work.num_entries // work.num_kv_heads
    num_chunks, chunk_size = config.chunks(entries_per_kv_head, work.num_kv_heads)
    entry_kv_blocks = torch.empty(work.num_entries, dtype=torch.int32, device=device)
    counts = torch.zeros(work.num_kv_heads * num_kv_blocks, num_chunks, dtype=torch.int32, device=device)
    dummy = ids_TNK
    grid = (num_chunks, work.num_kv_heads)
    count_entries[grid](
        ids_TNK,
        dummy if fragment.first_block_T is None else fragment.first_block_T,
        dummy if fragment.kv_block_of_block is None else fragment.kv_block_of_block,
        dummy if fragment.own_kv_block_T is None else fragment.own_kv_block_T,
        entry_kv_blocks, counts, work.tokens.start, work.num_tokens, work.first_kv_head, *ids_TNK.shape[1:],
        work.num_slots, num_kv_blocks, num_chunks, chunk_size, work.qheads_per_kvhead,
        HAS_FIRST=fragment.first_block_T is not None,
        HAS_TABLE=fragment.kv_block_of_block is not None,
        HAS_OWN=fragment.own_kv_block_T is not None,
        **config.tiles("count_entries"),
    )  # fmt: skip
    ends = torch.cumsum(counts.view(-1), 0, dtype=torch.int32).view_as(counts)
    cu_entries = torch.cat([ends.new_zeros(1), ends[:, -1]])
    order = torch.empty_like(entry_kv_blocks)
    scatter_entries[grid](
        entry_kv_blocks, ends.sub_(counts), order, entries_per_kv_head, num_kv_blocks, num_chunks, chunk_size,
        **config.tiles("scatter_entries"),
    )  # fmt: skip
    return Index(work, num_kv_blocks, entry_kv_blocks, order, cu_entries)


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


def cut(counts_L: Tensor, size: int, total: int) -> Splits:
    """Cut so many entries or rows each, at most `total` together, into splits.

    >>> splits = cut(torch.tensor([3, 0, 4]), 2, 7)
    >>> splits.split_of.tolist(), splits.cu_splits.tolist()
    ([0, 0, 2, 2, 3, 3], [0, 2, 2, 4])
    """
    last = ((counts_L + (size - 1)) // size).cumsum(0)
    # n entries are cut into at most n // size + 1 splits, and never into more splits than entries.
    splits = torch.arange(min(total, total // size + counts_L.numel()), device=counts_L.device)
    split_of = torch.searchsorted(last, splits, right=True, out_int32=True)
    return Splits(split_of, torch.cat([last.new_zeros(1), last]), size)


def cut_entries(index: Index, size: int) -> Splits:
    """Splits of the entries of each head block."""
    return cut(index.cu_entries.diff(), size, index.work.num_entries)


def cut_spans(spans: Spans, size: int, rows_per_token: int = 1) -> Splits:
    """Splits of the rows of each span: `rows_per_token` for each of its tokens."""
    counts = (spans.end - spans.start) * rows_per_token
    return cut(counts, size, spans.total * rows_per_token)
