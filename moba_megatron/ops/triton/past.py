"""Forward of units: gathered query rows attend keys they see entirely, as experts get their tokens.

Two forms with one result, a partial output in the inputs' dtype and a log-sum-exp in fp32 at each entry's place:

- `attend_short_units`: the whole unit fits a tile (block sizes up to 128). Its keys and values stay, and query tiles
  stream past them; there is nothing to rescale.
- `attend_long_units`: a tile of query rows stays and key tiles stream past, with the online softmax.

All query heads of a key head are rows of the same list and so share the loads of keys and values.

Traffic per entry: a query row read and a partial row written, 2 D elements (short units: and a piece's share of a
unit's keys and values); long units read 2 D B elements from cache for each tile of query rows. Products per entry:
2 B D multiply-adds.

Legend: D head size, B keys of a unit, S slots of a row, E entries of a pass.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moba_megatron.ops.fragments import Keys
from moba_megatron.ops.triton import config
from moba_megatron.ops.triton.common import (
    COUNTS,
    LN_2,
    LOG2_E,
    dot,
    load_keys,
    load_rows,
    store_rows,
)
from moba_megatron.ops.triton.fragments import DeviceFragment
from moba_megatron.ops.triton.index import (
    Index,
    cut_entries,
    entry_rows,
    piece_members,
)


@triton.jit(do_not_specialize=COUNTS)
def attend_short_units(
    q,
    k,
    v,
    unit_start,
    unit_end,
    order,
    list_first,
    list_of,
    piece_first,
    part,
    part_lse,
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
    """One program per piece of a list; BLOCK_N holds the longest unit."""
    piece = tl.program_id(0)
    this = tl.load(list_of + piece)
    if this >= num_lists:
        return
    low, high = piece_members(piece, this, list_first, piece_first, piece_size)
    group = this // num_units
    start = tl.load(unit_start + this % num_units)
    length = (tl.load(unit_end + this % num_units) - start).to(tl.int32)
    base = start * k_row + group.to(tl.int64) * k_head
    key = tl.arange(0, BLOCK_N)
    seen = key < length
    keys = load_keys(k + base, key, k_row, length, HEAD_SIZE, WIDTH)
    values = load_keys(v + base, key, k_row, length, HEAD_SIZE, WIDTH)
    for first in range(low, high, BLOCK_M):
        member = first + tl.arange(0, BLOCK_M)
        inside = member < high
        entry = tl.load(order + member, mask=inside, other=0)
        at = entry_rows(entry, group, slots, first_token, num_tokens, first_group, num_heads, group_size)
        queries = load_rows(q, at * HEAD_SIZE, inside, HEAD_SIZE, WIDTH)
        score = tl.where(seen[None, :], dot(queries, tl.trans(keys)) * (softmax_scale * LOG2_E), float("-inf"))
        top = tl.max(score, axis=1)
        weight = tl.exp2(score - top[:, None])
        total = tl.sum(weight, axis=1)
        out = dot(weight.to(values.dtype), values) / total[:, None]
        store_rows(part, entry.to(tl.int64) * HEAD_SIZE, inside, out, HEAD_SIZE, WIDTH)
        tl.store(part_lse + entry, (top + tl.log2(total)) * LN_2, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def attend_long_units(
    q,
    k,
    v,
    unit_start,
    unit_end,
    order,
    list_first,
    list_of,
    piece_first,
    part,
    part_lse,
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
    """One program per piece of a list; a piece is one tile of BLOCK_M query rows."""
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
    start = tl.load(unit_start + this % num_units)
    length = (tl.load(unit_end + this % num_units) - start).to(tl.int32)
    base = start * k_row + group.to(tl.int64) * k_head
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, WIDTH], dtype=tl.float32)
    for first in range(0, length, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        seen = key < length
        keys = load_keys(k + base, key, k_row, length, HEAD_SIZE, WIDTH)
        score = tl.where(seen[None, :], dot(queries, tl.trans(keys)) * (softmax_scale * LOG2_E), float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp2(score - higher[:, None])
        keep = tl.exp2(top - higher)
        total = total * keep + tl.sum(weight, axis=1)
        values = load_keys(v + base, key, k_row, length, HEAD_SIZE, WIDTH)
        acc = dot(weight.to(values.dtype), values, acc * keep[:, None])
        top = higher
    store_rows(part, entry.to(tl.int64) * HEAD_SIZE, inside, acc / total[:, None], HEAD_SIZE, WIDTH)
    tl.store(part_lse + entry, (top + tl.log2(total)) * LN_2, mask=inside)


def units_forward(
    q_TND: Tensor,
    keys: Keys,
    index: Index,
    fragment: DeviceFragment,
    softmax_scale: float,
    part_ED: Tensor,
    part_lse_E: Tensor,
) -> None:
    """Write output and log-sum-exp of every entry of a pass that has a unit; the others are left as they are.

    Args:
        keys: with k and v of equal strides and a contiguous last dimension.
        part_ED: [E, D] in q's dtype.
        part_lse_E: fp32 [E].
    """
    work, units = index.work, fragment.units
    short = config.holds_unit_for("attend_short_units", q_TND, units.longest)
    name = "attend_short_units" if short else "attend_long_units"
    tiles = config.tiles_for(name, q_TND, units.longest)
    pieces = cut_entries(index, config.piece_size(name, tiles))
    if pieces.pieces == 0:
        return
    kernel = attend_short_units if short else attend_long_units
    first = work.groups.start
    kernel[(pieces.pieces,)](
        q_TND, keys.k[:, first:], keys.v[:, first:], units.start, units.end,
        index.order, index.list_first, pieces.list_of, pieces.first, part_ED, part_lse_E,
        softmax_scale, keys.k.stride(0), keys.k.stride(1),
        index.num_lists, index.num_units, work.slots, pieces.size,
        work.tokens.start, work.num_tokens, work.first_head_group, q_TND.shape[1], work.group_size,
        **tiles,
    )  # fmt: skip
