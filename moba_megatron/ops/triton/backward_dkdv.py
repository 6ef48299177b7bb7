"""Backward, keys' side: dk and dv of units and of triangles, a key tile at a time.

A program holds a tile of keys and values in fp32 sums and walks query rows: those of a piece of a list (units), or the
rows of a stretch from the tile's first token on (triangles). With the *global* log-sum-exp and delta (the inner product
of the output and its gradient) exp(score - lse) is the true probability, so that shares simply add up. Where a unit
fits one key tile the share of dq of each entry comes out of the same scores and is written at the entry's place
(`WRITE_DQ`); longer units leave dq to `backward_queries`.

A piece's sums are written to memory, and `piece_sums` adds the pieces of a key tile in their order: no sum depends on
what ran first.

Traffic per entry: a row of q and of dout read and, with `WRITE_DQ`, a row of dq written, 3 D elements; per piece B rows
of sums, 16 B D bytes. Pieces hold at least four times as many entries as a unit has keys, so that this is at most half
of the partials of dq in bf16. Products per entry: 4 B D multiply-adds, 5 B D with dq.

Legend: S key rows, G key heads, D head size, B keys of a unit, E entries of a pass, W rows of piece sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_megatron.ops.fragments import Keys
from moba_megatron.ops.triton import config
from moba_megatron.ops.triton.combine import (
    add_sums,
    room_for_sums,
)
from moba_megatron.ops.triton.common import (
    COUNTS,
    LOG2_E,
    dot,
    load_keys,
    load_rows,
    quotient,
    row_offsets,
    safe_lse,
    second_id,
    store_rows,
)
from moba_megatron.ops.triton.fragments import DeviceFragment
from moba_megatron.ops.triton.index import (
    Index,
    cut_entries,
    cut_stretches,
    entry_rows,
    piece_members,
)
from moba_megatron.ops.triton.passes import (
    Known,
    Pass,
)


@triton.jit
def key_step(keys, values, queries, dout, lse, delta, softmax_scale, seen, dk, dv):
    """Add one query tile to dk (not yet scaled) and dv of a key tile.

    Args:
        lse: infinite for rows outside the tile, which so get weight 0.
        seen: bool, broadcastable to [keys, rows], which rows see which keys; None: all, what else may come of keys that
            are none being left unused.

    Returns:
        dk, dv, and the scores' gradient [keys, rows], not yet scaled.
    """
    score = dot(keys, tl.trans(queries)) * (softmax_scale * LOG2_E)
    weight = tl.exp2(score - safe_lse(lse)[None, :])
    if seen is not None:
        weight = tl.where(seen, weight, 0.0)
    dv = dot(weight.to(dout.dtype), dout, dv)
    slope = weight * (dot(values, tl.trans(dout)) - delta[None, :])
    slope = slope.to(queries.dtype)
    return dot(slope, queries, dk), dv, slope


@triton.jit(do_not_specialize=COUNTS)
def units_dkdv(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    unit_start,
    unit_end,
    order,
    list_first,
    list_of,
    piece_first,
    sum_first,
    dk_sums,
    dv_sums,
    part,
    softmax_scale,
    k_row,
    k_head,
    num_lists,
    num_units,
    slots,
    pieces,
    piece_size,
    first_token,
    num_tokens,
    first_group,
    num_heads,
    group_size,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    WRITE_DQ: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (key tile of a unit, piece of its list). Those of a piece run side by side: its rows are read
    from memory once and then from cache."""
    key_tile, piece = tl.program_id(0), second_id()
    if piece >= pieces:
        return
    this = tl.load(list_of + piece)
    if this >= num_lists:
        return
    group = this // num_units
    start = tl.load(unit_start + this % num_units)
    length = (tl.load(unit_end + this % num_units) - start).to(tl.int32)
    key = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if key_tile * BLOCK_N >= length:
        return
    low, high = piece_members(piece, this, list_first, piece_first, piece_size)
    base = start * k_row + group.to(tl.int64) * k_head
    keys = load_keys(k + base, key, k_row, length, HEAD_SIZE, WIDTH)
    values = load_keys(v + base, key, k_row, length, HEAD_SIZE, WIDTH)
    dk = tl.zeros([BLOCK_N, WIDTH], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, WIDTH], dtype=tl.float32)
    for first in range(low, high, BLOCK_M):
        member = first + tl.arange(0, BLOCK_M)
        inside = member < high
        entry = tl.load(order + member, mask=inside, other=0)
        at = entry_rows(entry, group, slots, first_token, num_tokens, first_group, num_heads, group_size)
        queries = load_rows(q, at * HEAD_SIZE, inside, HEAD_SIZE, WIDTH)
        slopes = load_rows(dout, at * HEAD_SIZE, inside, HEAD_SIZE, WIDTH)
        row_lse = tl.load(lse + at, mask=inside, other=float("inf"))
        row_delta = tl.load(delta + at, mask=inside, other=0.0)
        # Without dq nothing but the sums of keys that are none, never stored, would come of them.
        seen = (key < length)[:, None] if WRITE_DQ else None
        dk, dv, slope = key_step(keys, values, queries, slopes, row_lse, row_delta, softmax_scale, seen, dk, dv)
        if WRITE_DQ:
            dq = dot(tl.trans(slope), keys) * softmax_scale
            store_rows(part, entry.to(tl.int64) * HEAD_SIZE, inside, dq, HEAD_SIZE, WIDTH)
    target = (tl.load(sum_first + piece) + key) * HEAD_SIZE
    store_rows(dk_sums, target, key < length, dk * softmax_scale, HEAD_SIZE, WIDTH)
    store_rows(dv_sums, target, key < length, dv, HEAD_SIZE, WIDTH)


@triton.jit(do_not_specialize=COUNTS)
def own_dkdv(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    start,
    end,
    list_of,
    piece_first,
    dk,
    dv,
    softmax_scale,
    k_row,
    k_head,
    num_stretches,
    first_group,
    num_heads,
    group_size,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (key tile of a stretch, key head): writes dk and dv."""
    tile, group = tl.program_id(0), tl.program_id(1)
    stretch = tl.load(list_of + tile)
    if stretch >= num_stretches:
        return
    begin = tl.load(start + stretch)
    length = (tl.load(end + stretch) - begin).to(tl.int32)
    low = (tile - tl.load(piece_first + stretch)).to(tl.int32) * BLOCK_N
    key = low + tl.arange(0, BLOCK_N)
    base = begin * k_row + group.to(tl.int64) * k_head
    keys = load_keys(k + base, key, k_row, length, HEAD_SIZE, WIDTH)
    values = load_keys(v + base, key, k_row, length, HEAD_SIZE, WIDTH)
    total_k = tl.zeros([BLOCK_N, WIDTH], dtype=tl.float32)
    total_v = tl.zeros([BLOCK_N, WIDTH], dtype=tl.float32)
    origin = begin * num_heads + (first_group + group) * group_size
    for first in range(low * group_size, length * group_size, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        inside = row < length * group_size
        at = row_offsets(origin, row, quotient(row, group_size), num_heads, group_size)
        queries = load_rows(q, at * HEAD_SIZE, inside, HEAD_SIZE, WIDTH)
        slopes = load_rows(dout, at * HEAD_SIZE, inside, HEAD_SIZE, WIDTH)
        row_lse = tl.load(lse + at, mask=inside, other=float("inf"))
        row_delta = tl.load(delta + at, mask=inside, other=0.0)
        seen = (key * group_size)[:, None] <= row[None, :]
        total_k, total_v, _ = key_step(
            keys, values, queries, slopes, row_lse, row_delta, softmax_scale, seen, total_k, total_v
        )
    at = ((begin + key) * tl.num_programs(1) + group) * HEAD_SIZE
    store_rows(dk, at, key < length, total_k * softmax_scale, HEAD_SIZE, WIDTH)
    store_rows(dv, at, key < length, total_v, HEAD_SIZE, WIDTH)


def own_keys_backward(
    known: Known, keys: Keys, work: Pass, fragment: DeviceFragment, softmax_scale: float, dk_SGD: Tensor, dv_SGD: Tensor
) -> None:
    """Write the triangles' dk and dv, fp32 [S, key heads of the pass, D], of all rows under triangles."""
    triangles = fragment.triangles
    tiles = config.tiles_for("own_dkdv", known.q, triangles.longest)
    pieces = cut_stretches(triangles, tiles["BLOCK_N"])
    if pieces.pieces == 0:
        return
    first = work.groups.start
    own_dkdv[(pieces.pieces, work.num_groups)](
        known.q, keys.k[:, first:], keys.v[:, first:], *known.tensors, triangles.start, triangles.end,
        pieces.list_of, pieces.first, dk_SGD, dv_SGD,
        softmax_scale, keys.k.stride(0), keys.k.stride(1), triangles.count, work.first_head_group,
        known.q.shape[1], work.group_size, **tiles,
    )  # fmt: skip


def units_keys_backward(
    known: Known,
    keys: Keys,
    index: Index,
    fragment: DeviceFragment,
    softmax_scale: float,
    dk_SGD: Tensor,
    dv_SGD: Tensor,
    part_ED: Tensor | None,
) -> None:
    """Add the units' dk and dv for the entries of a pass to fp32 [S, key heads of the pass, D].

    Args:
        part_ED: where not None, the shares of dq are written there too, in the inputs' dtype (short units only).
    """
    work, units, size = index.work, fragment.units, known.q.shape[2]
    name = "units_dkdv" if part_ED is None else "units_dkdv_dq"
    tiles = config.tiles_for(name, known.q, units.longest)
    pieces = cut_entries(index, config.piece_size(name, tiles, units.longest))
    if pieces.pieces == 0:
        return
    sum_first, rows = room_for_sums(index, pieces, units)
    dk_sums, dv_sums = torch.empty(2, rows, size, dtype=torch.float32, device=known.q.device)
    key_tiles = triton.cdiv(units.longest, tiles["BLOCK_N"])
    first, bounds = work.groups.start, (units.start, units.end)
    units_dkdv[(key_tiles, *config.spread(pieces.pieces))](
        known.q, keys.k[:, first:], keys.v[:, first:], *known.tensors, *bounds,
        index.order, index.list_first, pieces.list_of, pieces.first, sum_first, dk_sums, dv_sums,
        dk_sums if part_ED is None else part_ED, softmax_scale, keys.k.stride(0), keys.k.stride(1),
        index.num_lists, index.num_units, work.slots, pieces.pieces, pieces.size,
        work.tokens.start, work.num_tokens, work.first_head_group, known.q.shape[1], work.group_size,
        WRITE_DQ=part_ED is not None, **tiles,
    )  # fmt: skip
    add_sums(index, pieces, units, sum_first, dk_sums, dv_sums, dk_SGD, dv_SGD)
