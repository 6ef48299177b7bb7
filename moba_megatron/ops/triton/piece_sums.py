"""Sums of dk and dv over the pieces of a list, added in order.

Each piece of a list writes its sums for all keys of its unit; the pieces of a key tile are then added one after the
other, those of units that start at the same row together, so that no sum depends on what ran first.

Traffic: 8 D bytes read per row of sums, 16 D bytes read and written per key row.

Legend: S key rows, G key heads of the pass, D head size, W rows of sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_megatron.ops.triton import config
from moba_megatron.ops.triton.common import COUNTS, load_rows, second_id, store_rows
from moba_megatron.ops.triton.fragment import Stretches
from moba_megatron.ops.triton.index import Index, WorkList


@triton.jit(do_not_specialize=COUNTS)
def add_pieces(
    dk_sums,
    dv_sums,
    unit_start,
    unit_end,
    list_of,
    piece_first,
    sum_first,
    dk,
    dv,
    num_units,
    num_groups,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (list, key tile): adds all pieces of the units that start where this one does, in order.

    Only the first of such units does the work.
    """
    this, key_tile = tl.program_id(0), second_id()
    group, unit = this // num_units, this % num_units
    start = tl.load(unit_start + unit)
    before = tl.load(unit_start + unit - 1, mask=unit > 0, other=-1)
    if (before == start) | (tl.load(unit_end + unit) == start):
        return
    key = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    total_k = tl.zeros([BLOCK_N, WIDTH], dtype=tl.float32)
    total_v = tl.zeros([BLOCK_N, WIDTH], dtype=tl.float32)
    longest = tl.full([], 0, tl.int32)
    more = unit < num_units
    while more:
        length = (tl.load(unit_end + unit) - start).to(tl.int32)
        longest = tl.maximum(longest, length)
        low, high = tl.load(piece_first + this), tl.load(piece_first + this + 1)
        if key_tile * BLOCK_N >= length:
            high = low
        for piece in range(low, high):
            source = (tl.load(sum_first + piece) + key) * HEAD_SIZE
            total_k += load_rows(dk_sums, source, key < length, HEAD_SIZE, WIDTH)
            total_v += load_rows(dv_sums, source, key < length, HEAD_SIZE, WIDTH)
        unit += 1
        this += 1
        more = tl.load(unit_start + unit, mask=unit < num_units, other=-1) == start
    at = ((start + key) * num_groups + group) * HEAD_SIZE
    inside = key < longest
    store_rows(dk, at, inside, load_rows(dk, at, inside, HEAD_SIZE, WIDTH) + total_k, HEAD_SIZE, WIDTH)
    store_rows(dv, at, inside, load_rows(dv, at, inside, HEAD_SIZE, WIDTH) + total_v, HEAD_SIZE, WIDTH)


def room_for_sums(index: Index, pieces: WorkList, units: Stretches) -> tuple[Tensor, int]:
    """Where each piece's sums begin (int64), and an upper bound on the rows of all of them."""
    lengths = (units.end - units.start).repeat(index.work.num_groups)
    lengths = torch.cat([lengths, lengths.new_zeros(1)])[pieces.list_of]
    rows = units.total * index.work.num_groups + index.work.entries // pieces.size * units.longest
    return lengths.cumsum(0) - lengths, rows


def add_sums(
    index: Index,
    pieces: WorkList,
    units: Stretches,
    sum_first: Tensor,
    dk_sums: Tensor,
    dv_sums: Tensor,
    dk_SGD: Tensor,
    dv_SGD: Tensor,
) -> None:
    """Add the pieces' sums fp32 [W, D], each from row `sum_first` on, to fp32 dk and dv [S, G, D]."""
    tiles = config.tiles_for("add_pieces", dk_SGD)
    key_tiles = triton.cdiv(units.longest, tiles["BLOCK_N"])
    add_pieces[(index.num_lists, *config.spread(key_tiles))](
        dk_sums, dv_sums, units.start, units.end, pieces.list_of, pieces.first, sum_first, dk_SGD, dv_SGD,
        index.num_units, index.work.num_groups, **tiles,
    )  # fmt: skip
