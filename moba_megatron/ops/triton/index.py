"""The dispatch index: for each (key head, unit) the list of query rows that attend it, made on the device by counting,
one prefix sum and a scatter.

An *entry* is a (query row, slot): entry = row * S + slot, where the rows of a *pass* (some key heads, a range of
tokens) are numbered key head by key head, token by token, head by head. The entry's number says which row to gather
and where its partial result goes, so that partials of a row lie together. Entries are cut into chunks of equal size;
each chunk counts its entries per list, a prefix sum over (list, chunk) tells every chunk where its entries of a list
begin, and a second walk puts them there: in rising order within each list, whatever ran first. Counting uses integer
atomics, whose sum does not depend on their order. Nothing waits for the host: launches are as large as the worst case,
and surplus programs return at once.

Traffic per entry: 4 bytes of ids, 8 of units, 4 of order; the counts take lists x chunks x 8 bytes.

Legend: T tokens, N query heads, R query heads per key head, K ids per query, S slots per row, U units, L lists (key
heads of the pass x U), E entries of a pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_megatron.ops.triton import config
from moba_megatron.ops.triton.common import (
    COUNTS,
    quotient,
    row_offsets,
)
from moba_megatron.ops.triton.fragments import DeviceFragment, Stretches
from moba_megatron.ops.triton.passes import (
    Pass,
)


@triton.jit(do_not_specialize=COUNTS)
def count_entries(
    ids,
    first_block,
    unit_of_block,
    own_unit,
    units,
    counts,
    first_token,
    num_tokens,
    first_group,
    num_heads,
    num_past,
    slots,
    num_units,
    chunks,
    chunk_entries,
    group_size,
    HAS_FIRST: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_OWN: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program per (chunk, key head): translates ids to units and counts them per list."""
    chunk, group = tl.program_id(0), tl.program_id(1)
    entries = num_tokens * group_size * slots
    origin = first_token.to(tl.int64) * num_heads + (first_group + group) * group_size
    low = chunk * chunk_entries
    high = tl.minimum(low + chunk_entries, entries)
    for first in range(low, high, BLOCK_E):
        entry = first + tl.arange(0, BLOCK_E)
        inside = entry < high
        row = quotient(entry, slots)
        slot = entry - row * slots
        own = quotient(row, group_size)
        token = first_token + own
        picked = inside & (slot < num_past)
        at = row_offsets(origin, row, own, num_heads, group_size)
        unit = tl.load(ids + at * num_past + slot, mask=picked, other=-1)
        if HAS_FIRST:
            picked = picked & (unit >= 0)
            number = unit + tl.load(first_block + token, mask=picked, other=0).to(tl.int32)
            if HAS_TABLE:
                number = tl.load(unit_of_block + number, mask=picked, other=-1)
            unit = tl.where(picked, number, -1)
        if HAS_OWN:
            own = inside & (slot == num_past)
            unit = tl.where(own, tl.load(own_unit + token, mask=own, other=-1), unit)
        tl.store(units + group.to(tl.int64) * entries + entry, unit, mask=inside)
        bin_of = (group.to(tl.int64) * num_units + unit) * chunks + chunk
        tl.atomic_add(counts + bin_of, 1, mask=inside & (unit >= 0), sem="relaxed")


@triton.jit(do_not_specialize=COUNTS)
def scatter_entries(
    units,
    offsets,
    order,
    entries,
    num_units,
    chunks,
    chunk_entries,
    BLOCK_E: tl.constexpr,
):
    """One program per (chunk, key head): puts the chunk's entries in their lists, in rising order."""
    chunk, group = tl.program_id(0), tl.program_id(1)
    low = chunk * chunk_entries
    high = tl.minimum(low + chunk_entries, entries)
    place = tl.arange(0, BLOCK_E)
    for first in range(low, high, BLOCK_E):
        entry = first + place
        unit = tl.load(units + group.to(tl.int64) * entries + entry, mask=entry < high, other=-1)
        there = unit >= 0
        same = unit[:, None] == unit[None, :]
        before = tl.sum((same & (place[None, :] < place[:, None])).to(tl.int32), axis=1)
        last = tl.sum(same.to(tl.int32), axis=1) == before + 1
        offset = offsets + (group.to(tl.int64) * num_units + unit) * chunks + chunk
        target = tl.load(offset, mask=there, other=0) + before
        tl.store(order + target, (group * entries + entry).to(tl.int32), mask=there)
        # All of a tile's loads come before its stores, and these before the next tile's loads.
        tl.debug_barrier()
        tl.store(offset, target + 1, mask=there & last)
        tl.debug_barrier()


@dataclass(frozen=True)
class Index:
    """Entries of a pass by list.

    Attributes:
        work: the pass.
        num_units: U; list l is unit l % U of the pass's key head l // U.
        units: int32 [E], the unit of each entry, -1 for none.
        order: int32 [E], entries by list; what lies past the last list is undefined.
        list_first: int32 [L + 1], where each list begins in `order`.
    """

    work: Pass
    num_units: int
    units: Tensor
    order: Tensor
    list_first: Tensor

    @property
    def num_lists(self) -> int:
        return self.list_first.numel() - 1


def build_index(work: Pass, ids_TNK: Tensor, fragment: DeviceFragment) -> Index:
    """List the entries of a pass by (key head, unit), in rising order; no host synchronisation.

    Args:
        ids_TNK: contiguous int32 [T, N, K], block numbers within the document (unit numbers where the fragment has no
            `first_block_T`), -1 for none, none twice in a row.
    """
    device, num_units = ids_TNK.device, fragment.units.count
    per_group = work.entries // work.num_groups
    chunks, chunk_entries = config.chunks(per_group, work.num_groups)
    units = torch.empty(work.entries, dtype=torch.int32, device=device)
    counts = torch.zeros(work.num_groups * num_units, chunks, dtype=torch.int32, device=device)
    dummy = ids_TNK
    grid = (chunks, work.num_groups)
    count_entries[grid](
        ids_TNK,
        dummy if fragment.first_block_T is None else fragment.first_block_T,
        dummy if fragment.unit_of_block is None else fragment.unit_of_block,
        dummy if fragment.own_unit_T is None else fragment.own_unit_T,
        units, counts, work.tokens.start, work.num_tokens, work.first_head_group, ids_TNK.shape[1], ids_TNK.shape[2],
        work.slots, num_units, chunks, chunk_entries, work.group_size,
        HAS_FIRST=fragment.first_block_T is not None,
        HAS_TABLE=fragment.unit_of_block is not None,
        HAS_OWN=fragment.own_unit_T is not None,
        **config.tiles("count_entries"),
    )  # fmt: skip
    ends = torch.cumsum(counts.view(-1), 0, dtype=torch.int32).view_as(counts)
    list_first = torch.cat([ends.new_zeros(1), ends[:, -1]])
    order = torch.empty_like(units)
    scatter_entries[grid](
        units, ends.sub_(counts), order, per_group, num_units, chunks, chunk_entries, **config.tiles("scatter_entries")
    )
    return Index(work, num_units, units, order, list_first)


@dataclass(frozen=True)
class WorkList:
    """Lists cut into pieces of at most `size` members, in order: piece i is members (i - first[list]) * size and on.

    Attributes:
        list_of: int32 [pieces], the list of each piece; the number of lists for surplus pieces.
        first: int64 [lists + 1], number of each list's first piece; the last is the true number of pieces.
        size: members of a piece.
    """

    list_of: Tensor
    first: Tensor
    size: int

    @property
    def pieces(self) -> int:
        """Pieces to launch, surplus ones included."""
        return self.list_of.numel()


def cut(counts_L: Tensor, size: int, total: int) -> WorkList:
    """Cut lists of these lengths, at most `total` members together, into pieces.

    >>> work = cut(torch.tensor([3, 0, 4]), 2, 7)
    >>> work.list_of.tolist(), work.first.tolist()
    ([0, 0, 2, 2, 3, 3], [0, 2, 2, 4])
    """
    last = ((counts_L + (size - 1)) // size).cumsum(0)
    # A list of n members is cut into at most n // size + 1 pieces, and no list is cut into more pieces than members.
    pieces = torch.arange(min(total, total // size + counts_L.numel()), device=counts_L.device)
    list_of = torch.searchsorted(last, pieces, right=True, out_int32=True)
    return WorkList(list_of, torch.cat([last.new_zeros(1), last]), size)


def cut_entries(index: Index, size: int) -> WorkList:
    """Pieces of the lists of an index."""
    return cut(index.list_first.diff(), size, index.work.entries)


def cut_stretches(stretches: Stretches, size: int, rows_per_token: int = 1) -> WorkList:
    """Pieces of stretches, whose members are rows: `rows_per_token` for each of their tokens."""
    counts = (stretches.end - stretches.start) * rows_per_token
    return cut(counts, size, stretches.total * rows_per_token)


@triton.jit
def piece_members(piece, this, list_first, piece_first, piece_size):
    """(first, one past the last) of the members in `order` of a piece of list `this`."""
    low = tl.load(list_first + this) + (piece - tl.load(piece_first + this)).to(tl.int32) * piece_size
    return low, tl.minimum(low + piece_size, tl.load(list_first + this + 1))


@triton.jit
def entry_rows(entry, group, slots, first_token, num_tokens, first_group, num_heads, group_size):
    """Place in [T, N] of the query rows of entries of one key head (`group`) of a pass."""
    row = quotient(entry, slots)
    origin = (first_token - group * num_tokens).to(tl.int64) * num_heads + (first_group + group) * group_size
    return row_offsets(origin, row, quotient(row, group_size), num_heads, group_size)
