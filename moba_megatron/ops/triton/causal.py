"""Forward of triangles (stretches that attend themselves causally: own blocks, in a whole pack) and the merge.

`attend_own` holds a tile of query rows of one key head, streams the stretch's keys up to the tile's last token, and
then, without writing anything in between, merges the row's partial outputs of past blocks in slot order: no partial of
the own block exists. `merge_rows` is the merge alone, into outputs that are there already, for fragments without
triangles.

Traffic per query row: q and out once, S D elements of partials, and the stretch's keys and values from cache.

Legend: T tokens, N query heads, D head size, S slots of a row, E entries of a pass.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moba_megatron.ops.fragments import Keys
from moba_megatron.ops.triton import config
from moba_megatron.ops.triton.combine import (
    merge_parts,
)
from moba_megatron.ops.triton.common import (
    COUNTS,
    LN_2,
    LOG2_E,
    dot,
    load_keys,
    load_rows,
    quotient,
    row_offsets,
    store_rows,
)
from moba_megatron.ops.triton.fragments import DeviceFragment
from moba_megatron.ops.triton.index import (
    cut_stretches,
)
from moba_megatron.ops.triton.passes import (
    Pass,
)


@triton.jit(do_not_specialize=COUNTS)
def attend_own(
    q,
    k,
    v,
    start,
    end,
    list_of,
    piece_first,
    part,
    part_lse,
    units,
    out,
    lse,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (tile of rows of a stretch, key head); only tokens of the pass are written."""
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
    base = begin * k_row + group.to(tl.int64) * k_head
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, WIDTH], dtype=tl.float32)
    last = tl.minimum(tl.max(own, axis=0) + 1, length)
    for first in range(0, last, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        keys = load_keys(k + base, key, k_row, length, HEAD_SIZE, WIDTH)
        score = dot(queries, tl.trans(keys)) * (softmax_scale * LOG2_E)
        score = tl.where(key[None, :] <= own[:, None], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=1))
        weight = tl.exp2(score - higher[:, None])
        keep = tl.exp2(top - higher)
        total = total * keep + tl.sum(weight, axis=1)
        values = load_keys(v + base, key, k_row, length, HEAD_SIZE, WIDTH)
        acc = dot(weight.to(values.dtype), values, acc * keep[:, None])
        top = higher
    if MERGE:
        entry = ((group * num_tokens + begin - first_token) * group_size + row) * slots
        acc, top, total = merge_parts(acc, top, total, part, part_lse, units, entry, inside, slots, HEAD_SIZE, WIDTH)
    store_rows(out, at * HEAD_SIZE, inside, acc / total[:, None], HEAD_SIZE, WIDTH)
    tl.store(lse + at, (top + tl.log2(total)) * LN_2, mask=inside)


def own_forward(
    q_TND: Tensor,
    keys: Keys,
    work: Pass,
    fragment: DeviceFragment,
    softmax_scale: float,
    parts: tuple[Tensor, Tensor, Tensor] | None,
    out_TND: Tensor,
    lse_TN: Tensor,
) -> None:
    """Write out and lse of the pass's rows under triangles.

    Args:
        parts: partial outputs [E, D], their log-sum-exps fp32 [E] and units int32 [E], to be merged in; None for none.
        out_TND: contiguous, in q's dtype or fp32.
    """
    merge = parts is not None
    tiles = config.tiles_for("attend_own", q_TND, fragment.triangles.longest)
    pieces = cut_stretches(fragment.triangles, tiles["BLOCK_M"], work.group_size)
    if pieces.pieces == 0:
        return
    part, part_lse, units = parts if merge else (q_TND, lse_TN, pieces.list_of)
    first = work.groups.start
    attend_own[(pieces.pieces, work.num_groups)](
        q_TND, keys.k[:, first:], keys.v[:, first:], fragment.triangles.start, fragment.triangles.end,
        pieces.list_of, pieces.first, part, part_lse, units, out_TND, lse_TN,
        softmax_scale, keys.k.stride(0), keys.k.stride(1), fragment.triangles.count,
        work.slots, work.tokens.start, work.num_tokens, work.first_head_group, q_TND.shape[1],
        work.group_size, MERGE=merge, **tiles,
    )  # fmt: skip
