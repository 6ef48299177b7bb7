"""Backward, queries' side: delta, dq of triangles and of long units, and the merge of the shares of dq.

`own_dq` holds a tile of query rows, walks the keys of its stretch, adds the row's shares of dq of past blocks in slot
order, and writes the whole: in a whole pack nothing of dq but these shares is ever in memory twice. `add_dq` adds the
shares alone, for fragments without triangles.

Traffic per query row: q, dout and dq once, S D elements of shares. Products: 3 B D multiply-adds per entry of a long
unit.

Legend: T tokens, N query heads, D head size, B keys of a unit, S slots of a row, E entries of a pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_megatron.ops.fragments import Keys
from moba_megatron.ops.triton import config
from moba_megatron.ops.triton.combine import (
    add_shares,
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
    store_rows,
)
from moba_megatron.ops.triton.devices import on_its_device
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


@triton.jit(do_not_specialize=COUNTS)
def output_delta_rows(out, dout, delta, num_rows, HEAD_SIZE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr):
    """One program per tile of rows: inner products of the output and its gradient."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < num_rows
    product = load_rows(out, row * HEAD_SIZE, inside, HEAD_SIZE, WIDTH).to(tl.float32)
    product *= load_rows(dout, row * HEAD_SIZE, inside, HEAD_SIZE, WIDTH).to(tl.float32)
    tl.store(delta + row, tl.sum(product, axis=1), mask=inside)


@triton.jit
def query_step(queries, dout, keys, values, lse, delta, softmax_scale, seen, dq):
    """Add one key tile to dq (not yet scaled) of a query tile."""
    score = dot(queries, tl.trans(keys)) * (softmax_scale * LOG2_E)
    weight = tl.where(seen, tl.exp2(score - lse[:, None]), 0.0)
    slope = weight * (dot(dout, tl.trans(values)) - delta[:, None])
    return dot(slope.to(keys.dtype), keys, dq)


@triton.jit(do_not_specialize=COUNTS)
def units_dq(
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
    part,
    softmax_scale,
    k_row,
    k_head,
    num_lists,
    num_units,
    slots,
    piece_size,
    first_token,
    num_tokens,
    first_group,
    num_heads,
    group_size,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per piece of a list, which is one tile of query rows: writes their shares of dq."""
    piece = tl.program_id(0)
    this = tl.load(list_of + piece)
    if this >= num_lists:
        return
    low, high = piece_members(piece, this, list_first, piece_first, piece_size)
    group = this // num_units
    member = low + tl.arange(0, BLOCK_M)
    inside = member < high
    entry = tl.load(order + member, mask=inside, other=0)
    at = entry_rows(entry, group, slots, first_token, num_tokens, first_group, num_heads, group_size)
    queries = load_rows(q, at * HEAD_SIZE, inside, HEAD_SIZE, WIDTH)
    slopes = load_rows(dout, at * HEAD_SIZE, inside, HEAD_SIZE, WIDTH)
    row_lse = safe_lse(tl.load(lse + at, mask=inside, other=0.0))
    row_delta = tl.load(delta + at, mask=inside, other=0.0)
    start = tl.load(unit_start + this % num_units)
    length = (tl.load(unit_end + this % num_units) - start).to(tl.int32)
    base = start * k_row + group.to(tl.int64) * k_head
    dq = tl.zeros([BLOCK_M, WIDTH], dtype=tl.float32)
    for first in range(0, length, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        keys = load_keys(k + base, key, k_row, length, HEAD_SIZE, WIDTH)
        values = load_keys(v + base, key, k_row, length, HEAD_SIZE, WIDTH)
        seen = (key < length)[None, :]
        dq = query_step(queries, slopes, keys, values, row_lse, row_delta, softmax_scale, seen, dq)
    store_rows(part, entry.to(tl.int64) * HEAD_SIZE, inside, dq * softmax_scale, HEAD_SIZE, WIDTH)


@triton.jit(do_not_specialize=COUNTS)
def own_dq(
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
    part,
    units,
    dq,
    softmax_scale,
    k_row,
    k_head,
    num_stretches,
    slots,
    first_token,
    num_tokens,
    first_group,
    num_heads,
    group_size,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    MERGE: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (tile of rows of a stretch, key head); only tokens of the pass are written, or added to."""
    tile, group = tl.program_id(0), tl.program_id(1)
    stretch = tl.load(list_of + tile)
    if stretch >= num_stretches:
        return
    begin = tl.load(start + stretch)
    length = (tl.load(end + stretch) - begin).to(tl.int32)
    row = (tile - tl.load(piece_first + stretch)).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    own = quotient(row, group_size)
    token = begin + own
    inside = (own < length) & (token >= first_token) & (token < first_token + num_tokens)
    if tl.max(inside.to(tl.int32), axis=0) == 0:
        return
    origin = begin * num_heads + (first_group + group) * group_size
    at = row_offsets(origin, row, own, num_heads, group_size)
    queries = load_rows(q, at * HEAD_SIZE, inside, HEAD_SIZE, WIDTH)
    slopes = load_rows(dout, at * HEAD_SIZE, inside, HEAD_SIZE, WIDTH)
    row_lse = safe_lse(tl.load(lse + at, mask=inside, other=0.0))
    row_delta = tl.load(delta + at, mask=inside, other=0.0)
    base = begin * k_row + group.to(tl.int64) * k_head
    total = tl.zeros([BLOCK_M, WIDTH], dtype=tl.float32)
    for first in range(0, tl.minimum(tl.max(own, axis=0) + 1, length), BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        keys = load_keys(k + base, key, k_row, length, HEAD_SIZE, WIDTH)
        values = load_keys(v + base, key, k_row, length, HEAD_SIZE, WIDTH)
        seen = key[None, :] <= own[:, None]
        total = query_step(queries, slopes, keys, values, row_lse, row_delta, softmax_scale, seen, total)
    total *= softmax_scale
    if MERGE:
        entry = ((group * num_tokens + begin - first_token) * group_size + row) * slots
        total = add_shares(total, part, units, entry, inside, slots, HEAD_SIZE, WIDTH)
    if ADD:
        total += load_rows(dq, at * HEAD_SIZE, inside, HEAD_SIZE, WIDTH).to(tl.float32)
    store_rows(dq, at * HEAD_SIZE, inside, total, HEAD_SIZE, WIDTH)


@on_its_device
def output_delta(dout_TND: Tensor, out_TND: Tensor) -> Tensor:
    """fp32 [T, N]: inner products of the output and its gradient, both contiguous [T, N, D]."""
    tokens, heads, size = out_TND.shape
    delta_TN = torch.empty(tokens, heads, dtype=torch.float32, device=out_TND.device)
    tiles = config.tiles_for("output_delta_rows", out_TND)
    output_delta_rows[(triton.cdiv(tokens * heads, tiles["BLOCK_M"]),)](
        out_TND, dout_TND, delta_TN, tokens * heads, **tiles
    )
    return delta_TN


def units_queries_backward(
    known: Known, keys: Keys, index: Index, fragment: DeviceFragment, softmax_scale: float, part_ED: Tensor
) -> None:
    """Write the share of dq of every entry of a pass that has a unit, in the inputs' dtype."""
    work, units = index.work, fragment.units
    tiles = config.tiles_for("units_dq", known.q, units.longest)
    pieces = cut_entries(index, config.piece_size("units_dq", tiles))
    if pieces.pieces == 0:
        return
    first = work.groups.start
    units_dq[(pieces.pieces,)](
        known.q, keys.k[:, first:], keys.v[:, first:], *known.tensors, units.start, units.end,
        index.order, index.list_first, pieces.list_of, pieces.first, part_ED,
        softmax_scale, keys.k.stride(0), keys.k.stride(1),
        index.num_lists, index.num_units, work.slots, pieces.size,
        work.tokens.start, work.num_tokens, work.first_head_group, known.q.shape[1], work.group_size,
        **tiles,
    )  # fmt: skip


def own_queries_backward(
    known: Known,
    keys: Keys,
    work: Pass,
    fragment: DeviceFragment,
    softmax_scale: float,
    parts: tuple[Tensor, Tensor] | None,
    dq_TND: Tensor,
    add: bool,
) -> None:
    """Write dq of the pass's rows under triangles, or add to it.

    Args:
        parts: shares of dq [E, D] and units int32 [E], added in; None for none.
        dq_TND: contiguous; fp32 where `add`, else any floating dtype.
    """
    triangles, merge = fragment.triangles, parts is not None
    tiles = config.tiles_for("own_dq", known.q, triangles.longest)
    pieces = cut_stretches(triangles, tiles["BLOCK_M"], work.group_size)
    if pieces.pieces == 0:
        return
    part, units = parts if merge else (known.q, pieces.list_of)
    first = work.groups.start
    own_dq[(pieces.pieces, work.num_groups)](
        known.q, keys.k[:, first:], keys.v[:, first:], *known.tensors, triangles.start, triangles.end,
        pieces.list_of, pieces.first, part, units, dq_TND,
        softmax_scale, keys.k.stride(0), keys.k.stride(1), triangles.count,
        work.slots, work.tokens.start, work.num_tokens, work.first_head_group, known.q.shape[1],
        work.group_size, MERGE=merge, ADD=add, **tiles,
    )  # fmt: skip
