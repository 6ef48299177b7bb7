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
from moba_megatron.ops.triton.common import (
    COUNTS,
    LN_2,
    LOG2_E,
    load_rows,
    row_offsets,
    second_id,
    store_rows,
)
from moba_megatron.ops.triton.fragments import Stretches
from moba_megatron.ops.triton.index import (
    Index,
    WorkList,
)
from moba_megatron.ops.triton.passes import (
    Pass,
)


@triton.jit
def merge_parts(acc, top, total, part, part_lse, units, entry, inside, slots,
                HEAD_SIZE: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Merge a row's partial outputs, in slot order, into its running (acc, top, total) by log-sum-exp in base 2.

    Args:
        acc [rows, WIDTH], top [rows], total [rows]: sum of exp2(score - top) * value, largest score, sum of weights.
        entry [rows]: int64 number of each row's first entry.
        slots: entries per row; those whose unit is -1 were never written.
    """
    for slot in range(0, slots):
        there = inside & (tl.load(units + entry + slot, mask=inside, other=-1) >= 0)
        lse = tl.load(part_lse + entry + slot, mask=there, other=float("-inf")) * LOG2_E
        rows = load_rows(part, (entry + slot) * HEAD_SIZE, there, HEAD_SIZE, WIDTH)
        higher = tl.maximum(top, lse)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        keep = tl.exp2(top - shift)
        weight = tl.exp2(lse - shift)
        acc = acc * keep[:, None] + rows.to(tl.float32) * weight[:, None]
        total = total * keep + weight
        top = higher
    return acc, top, total


@triton.jit(do_not_specialize=COUNTS)
def merge_rows(
    part,
    part_lse,
    units,
    out,
    lse,
    num_rows,
    slots,
    first_token,
    num_tokens,
    first_group,
    num_heads,
    group_size,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program per tile of rows of the pass: merge partial outputs into out and lse, in place."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < num_rows
    token = row // group_size
    group = token // num_tokens
    origin = (first_token - group * num_tokens) * num_heads + (first_group + group) * group_size
    at = row_offsets(origin, row, token, num_heads, group_size)
    top = tl.load(lse + at, mask=inside, other=float("-inf")) * LOG2_E
    total = tl.where(top == float("-inf"), 0.0, 1.0)
    acc = load_rows(out, at * HEAD_SIZE, inside, HEAD_SIZE, WIDTH).to(tl.float32) * total[:, None]
    acc, top, total = merge_parts(acc, top, total, part, part_lse, units, row * slots, inside, slots, HEAD_SIZE, WIDTH)
    empty = total == 0
    store_rows(out, at * HEAD_SIZE, inside, acc / tl.where(empty, 1.0, total)[:, None], HEAD_SIZE, WIDTH)
    merged = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * LN_2)
    tl.store(lse + at, merged, mask=inside)


def merge_forward(work: Pass, parts: tuple[Tensor, Tensor, Tensor], out_TND: Tensor, lse_TN: Tensor) -> None:
    """Merge partial outputs (as for `own_forward`) into the out and lse of all rows of the pass, in place."""
    tiles = config.tiles_for("merge_rows", parts[0])
    merge_rows[(triton.cdiv(work.rows, tiles["BLOCK_M"]),)](
        *parts, out_TND, lse_TN, work.rows, work.slots,
        work.tokens.start, work.num_tokens, work.first_head_group, out_TND.shape[1], work.group_size,
        **tiles,
    )  # fmt: skip


@triton.jit
def add_shares(total, part, units, entry, inside, slots, HEAD_SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Add a row's shares in slot order; slots whose unit is -1 were never written."""
    for slot in range(0, slots):
        there = inside & (tl.load(units + entry + slot, mask=inside, other=-1) >= 0)
        total += load_rows(part, (entry + slot) * HEAD_SIZE, there, HEAD_SIZE, WIDTH).to(tl.float32)
    return total


@triton.jit(do_not_specialize=COUNTS)
def add_dq(
    part,
    units,
    dq,
    num_rows,
    slots,
    first_token,
    num_tokens,
    first_group,
    num_heads,
    group_size,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program per tile of rows of the pass: adds their shares to dq."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < num_rows
    token = row // group_size
    group = token // num_tokens
    origin = (first_token - group * num_tokens) * num_heads + (first_group + group) * group_size
    at = row_offsets(origin, row, token, num_heads, group_size)
    total = load_rows(dq, at * HEAD_SIZE, inside, HEAD_SIZE, WIDTH).to(tl.float32)
    total = add_shares(total, part, units, row * slots, inside, slots, HEAD_SIZE, WIDTH)
    store_rows(dq, at * HEAD_SIZE, inside, total, HEAD_SIZE, WIDTH)


def merge_dq(work: Pass, parts: tuple[Tensor, Tensor], dq_TND: Tensor) -> None:
    """Add the shares (as for `own_queries_backward`) to dq of all rows of the pass."""
    tiles = config.tiles_for("add_dq", parts[0])
    add_dq[(triton.cdiv(work.rows, tiles["BLOCK_M"]),)](
        *parts, dq_TND, work.rows, work.slots,
        work.tokens.start, work.num_tokens, work.first_head_group, dq_TND.shape[1], work.group_size,
        **tiles,
    )  # fmt: skip


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
