"""The index: entries sorted by (kv head, kv block), made on the device by counting, prefix sums and a scatter.

The rows of a pass are numbered kv head by kv head, token by token, head by head, and an entry by row * num_slots +
slot. The number says which row to gather and where its partial result goes, so that partial results of a row lie
together. Four launches:

1. `count_entries`: entries are cut into chunks of equal size; each chunk counts its entries of each head block. That
   uses integer atomics, whose sum does not depend on their order. `gather_entries` does it for fragments in which a
   row cannot have as many blocks as ids: there its slots are those of the ids whose blocks are at hand.
2. `rank_chunks`: for each head block, how many entries lie in the chunks before each.
3. `splits.split_entries`: where the entries of each head block begin, and their splits.
4. `scatter_entries`: a second walk puts the entries of each chunk there: in rising order within each kv block, whatever
   ran first.

Nothing waits for the host: launches are sized for the worst case, and surplus programs return at once.

Traffic per entry: 4 bytes of ids, 8 of kv blocks, 4 of order; the counts take L x chunks x 4 bytes.

Legend: T tokens, N query heads, K ids per query, E entries of a pass, attended or not, L head blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_megatron.ops.triton import config
from moba_megatron.ops.triton.common import COUNTS, bounds_of, query_rows, quotient
from moba_megatron.ops.triton.fragments import DeviceFragment, Spans
from moba_megatron.ops.triton.passes import Pass
from moba_megatron.ops.triton.splits import Splits, room_for_splits, split_entries


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
    own_counts_ptr = counts_ptr + (kv_head.to(tl.int64) * num_chunks + chunk) * num_kv_blocks
    for first in range(0, num_kv_blocks, BLOCK_E):
        kv_block = first + tl.arange(0, BLOCK_E)
        tl.store(own_counts_ptr + kv_block, tl.zeros([BLOCK_E], dtype=tl.int32), mask=kv_block < num_kv_blocks)
    # Other threads add to what one has set to zero.
    tl.debug_barrier()
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
        tl.atomic_add(own_counts_ptr + kv_block, 1, mask=inside & (kv_block >= 0), sem="relaxed")


@triton.jit(do_not_specialize=COUNTS)
def gather_entries(
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
    HAS_OWN: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program per (chunk, kv head), of whole rows: as `count_entries`, but the first slots of a row are those of
    its ids whose blocks are at hand, in order; KEEP is a power of two that holds all ids."""
    chunk, kv_head = tl.program_id(0), tl.program_id(1)
    own_counts_ptr = counts_ptr + (kv_head.to(tl.int64) * num_chunks + chunk) * num_kv_blocks
    for first in range(0, num_kv_blocks, BLOCK_E):
        kv_block = first + tl.arange(0, BLOCK_E)
        tl.store(own_counts_ptr + kv_block, tl.zeros([BLOCK_E], dtype=tl.int32), mask=kv_block < num_kv_blocks)
    # Other threads add to what one has set to zero.
    tl.debug_barrier()
    num_rows = num_tokens * qheads_per_kvhead
    origin = first_token.to(tl.int64) * num_heads + (first_kv_head + kv_head) * qheads_per_kvhead
    chosen_slots = num_slots
    if HAS_OWN:
        chosen_slots = num_slots - 1
    low = quotient(chunk * chunk_size, num_slots)
    high = tl.minimum(low + quotient(chunk_size, num_slots), num_rows)
    place = tl.arange(0, KEEP)
    for first in range(low, high, BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        inside = offs_m < high
        position = quotient(offs_m, qheads_per_kvhead)
        token = first_token + position
        row = query_rows(origin, offs_m, position, num_heads, qheads_per_kvhead)
        picked = inside[:, None] & (place < num_past)[None, :]
        block = tl.load(ids_ptr + row[:, None] * num_past + place[None, :], mask=picked, other=-1)
        picked = picked & (block >= 0)
        number = block + tl.load(first_block_ptr + token, mask=inside, other=0).to(tl.int32)[:, None]
        kv_block = tl.load(kv_block_of_block_ptr + number, mask=picked, other=-1)
        held = (kv_block >= 0).to(tl.int32)
        slot = tl.cumsum(held, 1) - 1
        entry_ptr = entry_kv_block_ptr + (kv_head.to(tl.int64) * num_rows + offs_m) * num_slots
        for chosen in range(0, chosen_slots):
            here = tl.max(tl.where((held > 0) & (slot == chosen), kv_block, -1), axis=1)
            tl.store(entry_ptr + chosen, here, mask=inside)
            tl.atomic_add(own_counts_ptr + here, 1, mask=inside & (here >= 0), sem="relaxed")
        if HAS_OWN:
            own = tl.load(own_kv_block_ptr + token, mask=inside, other=-1)
            tl.store(entry_ptr + chosen_slots, own, mask=inside)
            tl.atomic_add(own_counts_ptr + own, 1, mask=inside & (own >= 0), sem="relaxed")


@triton.jit(do_not_specialize=COUNTS)
def rank_chunks(counts_ptr, totals_ptr, num_kv_blocks, num_chunks, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr):
    """One program per (tile of kv blocks, kv head): replaces each chunk's count by those of the chunks before it, and
    writes the sum of all."""
    kv_head = tl.program_id(1)
    kv_block = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    total = tl.zeros([BLOCK_L], dtype=tl.int32)
    for first in range(0, num_chunks, BLOCK_C):
        chunk = first + tl.arange(0, BLOCK_C)
        place = (kv_head.to(tl.int64) * num_chunks + chunk)[:, None] * num_kv_blocks + kv_block[None, :]
        mask = (chunk < num_chunks)[:, None] & (kv_block < num_kv_blocks)[None, :]
        count = tl.load(counts_ptr + place, mask=mask, other=0)
        tl.store(counts_ptr + place, total[None, :] + tl.cumsum(count, 0) - count, mask=mask)
        total += tl.sum(count, axis=0)
    tl.store(totals_ptr + kv_head * num_kv_blocks + kv_block, total, mask=kv_block < num_kv_blocks)


@triton.jit(do_not_specialize=COUNTS)
def scatter_entries(
    entry_kv_block_ptr,
    offsets_ptr,
    cu_entries_ptr,
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
        start = tl.load(cu_entries_ptr + kv_head * num_kv_blocks + kv_block, mask=attended, other=0)
        offset_ptr = offsets_ptr + (kv_head.to(tl.int64) * num_chunks + chunk) * num_kv_blocks + kv_block
        offset = tl.load(offset_ptr, mask=attended, other=0) + before
        tl.store(order_ptr + start + offset, (kv_head * num_entries + entry).to(tl.int32), mask=attended)
        # All of a tile's loads come before its stores, and these before the next tile's loads.
        tl.debug_barrier()
        tl.store(offset_ptr, offset + 1, mask=attended & last)
        tl.debug_barrier()


@triton.jit
def entries_of_split(split, head_block, cu_entries_ptr, cu_splits_ptr, split_size):
    """(first, one past the last) place in `order` of a split of the entries of a head block."""
    low = tl.load(cu_entries_ptr + head_block) + (split - tl.load(cu_splits_ptr + head_block)).to(tl.int32) * split_size
    return low, tl.minimum(low + split_size, tl.load(cu_entries_ptr + head_block + 1))


@triton.jit
def keys_of_head_block(head_block, kv_block_start_ptr, kv_block_end_ptr, num_kv_blocks, stride_kn, stride_kh):
    """(number of keys, offset of the first) of the kv block and kv head of a head block."""
    start, length = bounds_of(head_block % num_kv_blocks, kv_block_start_ptr, kv_block_end_ptr)
    return length, start * stride_kn + (head_block // num_kv_blocks).to(tl.int64) * stride_kh


@triton.jit
def tile_of_entries(
    first, high, order_ptr, kv_head, num_slots, first_token, num_tokens, first_kv_head, num_heads, qheads_per_kvhead,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Entries of one kv head of a pass, from place `first` of `order` on and before place `high`: the entries, their
    query rows, and which of them exist."""
    places = first + tl.arange(0, BLOCK_M)
    mask_m = places < high
    entry = tl.load(order_ptr + places, mask=mask_m, other=0)
    offs_m = quotient(entry, num_slots)
    origin = (first_token - kv_head * num_tokens).to(tl.int64) * num_heads + (
        first_kv_head + kv_head
    ) * qheads_per_kvhead
    row = query_rows(origin, offs_m, quotient(offs_m, qheads_per_kvhead), num_heads, qheads_per_kvhead)
    return entry, row, mask_m


@dataclass(frozen=True)
class Cut:
    """How a kernel wants the entries of each head block cut.

    Attributes:
        size: entries of a split.
        longest: rows that a split's partial sums take at most; 0 where a kernel writes none.
    """

    size: int
    longest: int = 0


@dataclass(frozen=True)
class Index:
    """Entries of a pass, sorted by (kv head, kv block).

    Attributes:
        work: the pass.
        num_kv_blocks: of a kv head.
        entry_kv_blocks: int32 [E], the kv block of each entry, -1 for none.
        order: int32 [E], the attended entries sorted; what lies past them is undefined.
        cu_entries: int32 [L + 1], where the entries of each head block begin in `order`.
        splits: of the entries of each head block, one for each cut asked for.
        partial_start: int64 [splits of the first cut], where each split's partial sums begin; None where it has none.
        num_partials: an upper bound on the rows of all of them.
    """

    work: Pass
    num_kv_blocks: int
    entry_kv_blocks: Tensor
    order: Tensor
    cu_entries: Tensor
    splits: tuple[Splits, ...]
    partial_start: Tensor | None
    num_partials: int

    @property
    def num_head_blocks(self) -> int:
        """L."""
        return self.cu_entries.numel() - 1


def build_index(work: Pass, ids_TNK: Tensor, fragment: DeviceFragment, first: Cut, other: Cut | None = None) -> Index:
    """Sort the entries of a pass by (kv head, kv block), in rising order, and cut them; no host synchronisation.

    Args:
        ids_TNK: contiguous int32 [T, N, K], block numbers within the document (numbers of kv blocks where the fragment
            has no `first_block_T`), -1 for none, none twice in a row.
        first, other: cuts; only the first may have partial sums.
    """
    device, num_kv_blocks = ids_TNK.device, fragment.kv_blocks.count
    entries_per_kv_head = work.num_entries // work.num_kv_heads
    num_chunks, chunk_size = config.chunks(entries_per_kv_head, work.num_kv_heads)
    gathers = fragment.gathers(ids_TNK.shape[2])
    if gathers:
        chunk_size = triton.cdiv(chunk_size, work.num_slots) * work.num_slots
        num_chunks = triton.cdiv(entries_per_kv_head, chunk_size)
    entry_kv_blocks = torch.empty(work.num_entries, dtype=torch.int32, device=device)
    counts = torch.empty(work.num_kv_heads * num_chunks * num_kv_blocks, dtype=torch.int32, device=device)
    grid = (num_chunks, work.num_kv_heads)
    tables = (fragment.first_block_T, fragment.kv_block_of_block, fragment.own_kv_block_T)
    arguments = (
        ids_TNK, *(ids_TNK if table is None else table for table in tables),
        entry_kv_blocks, counts, work.tokens.start, work.num_tokens, work.first_kv_head, *ids_TNK.shape[1:],
        work.num_slots, num_kv_blocks, num_chunks, chunk_size, work.qheads_per_kvhead,
    )  # fmt: skip
    first_T, table_M, own_T = (table is not None for table in tables)
    if gathers:
        gather_entries[grid](*arguments, HAS_OWN=own_T, **config.gather_tiles(ids_TNK.shape[2]))
    else:
        flags = {"HAS_FIRST": first_T, "HAS_TABLE": table_M, "HAS_OWN": own_T}
        count_entries[grid](*arguments, **flags, **config.tiles("count_entries"))
    totals = torch.empty(work.num_kv_heads * num_kv_blocks, dtype=torch.int32, device=device)
    tiles = config.tiles("rank_chunks")
    rank_chunks[(triton.cdiv(num_kv_blocks, tiles["BLOCK_L"]), work.num_kv_heads)](
        counts, totals, num_kv_blocks, num_chunks, **tiles
    )
    index = _cut(work, totals, fragment.kv_blocks, entry_kv_blocks, first, other)
    scatter_entries[grid](
        entry_kv_blocks, counts, index.cu_entries, index.order, entries_per_kv_head, num_kv_blocks, num_chunks,
        chunk_size, **config.tiles("scatter_entries"),
    )  # fmt: skip
    return index


def _cut(work: Pass, totals: Tensor, kv_blocks: Spans, entry_kv_blocks: Tensor, first: Cut, other: Cut | None) -> Index:
    """The index with room for `order`, from the number of entries of each head block."""
    device, num_head_blocks = totals.device, totals.numel()
    cu_entries = torch.empty(num_head_blocks + 1, dtype=torch.int32, device=device)
    cuts = (first,) if other is None else (first, other)
    splits = tuple(room_for_splits(num_head_blocks, cut.size, work.num_entries, device) for cut in cuts)
    partial_start, num_partials = None, 0
    if first.longest:
        partial_start = torch.empty(splits[0].count, dtype=torch.int64, device=device)
        num_partials = kv_blocks.total * work.num_kv_heads + work.num_entries // first.size * first.longest
    tiles, last = config.tiles("split_entries"), splits[-1]
    split_entries[(triton.cdiv(num_head_blocks, tiles["BLOCK_L"]),)](
        totals, kv_blocks.start, kv_blocks.end, cu_entries, splits[0].split_of, splits[0].cu_splits,
        splits[0].cu_splits if partial_start is None else partial_start, last.split_of, last.cu_splits,
        num_head_blocks, kv_blocks.count, splits[0].count, splits[0].size, last.count, last.size,
        SUMS=partial_start is not None, OTHER=other is not None, **tiles,
    )  # fmt: skip
    order = torch.empty_like(entry_kv_blocks)
    return Index(work, kv_blocks.count, entry_kv_blocks, order, cu_entries, splits, partial_start, num_partials)
