"""Forward of past blocks: gathered query rows attend kv blocks whole, as experts get their tokens.

Two forms with one result, a partial output in the inputs' dtype and a log-sum-exp in fp32 at each entry's place:

- `past_fwd_short`: the whole kv block fits a tile (block sizes up to 128). Its keys and values stay, and query tiles
  stream past them; there is nothing to rescale.
- `past_fwd_long`: a tile of query rows stays and key tiles stream past, with the online softmax.

All query heads of a kv head attend a kv block together and so share the loads of keys and values.

Traffic per entry: a query row read and a partial row written, 2 D elements (short kv blocks: and a split's part of
their keys and values); long ones read 2 D B elements from cache for each tile of query rows. Products per entry: 2 B D
multiply-adds.

Legend: D head size, B keys of a kv block, E entries of a pass.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moba_megatron.ops.fragments import Keys
from moba_megatron.ops.triton import config
from moba_megatron.ops.triton.common import COUNTS, LN_2, LOG2_E, dot, load_kv, load_rows, store_rows
from moba_megatron.ops.triton.fragments import DeviceFragment
from moba_megatron.ops.triton.index import Cut, Index, entries_of_split, keys_of_head_block, tile_of_entries


@triton.jit(do_not_specialize=COUNTS)
def past_fwd_short(
    q_ptr,
    k_ptr,
    v_ptr,
    kv_block_start_ptr,
    kv_block_end_ptr,
    order_ptr,
    cu_entries_ptr,
    split_of_ptr,
    cu_splits_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    softmax_scale,
    stride_kn,
    stride_kh,
    num_head_blocks,
    num_kv_blocks,
    num_slots,
    split_size,
    first_token,
    num_tokens,
    first_kv_head,
    num_heads,
    qheads_per_kvhead,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per split of the entries of a head block; BLOCK_N holds the longest kv block."""
    split = tl.program_id(0)
    head_block = tl.load(split_of_ptr + split)
    if head_block >= num_head_blocks:
        return
    low, high = entries_of_split(split, head_block, cu_entries_ptr, cu_splits_ptr, split_size)
    kv_head = head_block // num_kv_blocks
    length, base = keys_of_head_block(
        head_block, kv_block_start_ptr, kv_block_end_ptr, num_kv_blocks, stride_kn, stride_kh
    )
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < length
    k = load_kv(k_ptr + base, offs_n, stride_kn, length, HEAD_DIM, BLOCK_D)
    v = load_kv(v_ptr + base, offs_n, stride_kn, length, HEAD_DIM, BLOCK_D)
    for first in range(low, high, BLOCK_M):
        entry, row, mask_m = tile_of_entries(
            first, high, order_ptr, kv_head, num_slots, first_token, num_tokens, first_kv_head, num_heads,
            qheads_per_kvhead, BLOCK_M,
        )  # fmt: skip
        q = load_rows(q_ptr, row * HEAD_DIM, mask_m, HEAD_DIM, BLOCK_D)
        s = tl.where(mask_n[None, :], dot(q, tl.trans(k)) * (softmax_scale * LOG2_E), float("-inf"))
        m = tl.max(s, axis=1)
        p = tl.exp2(s - m[:, None])
        l = tl.sum(p, axis=1)
        out = dot(p.to(v.dtype), v) / l[:, None]
        store_rows(partial_out_ptr, entry.to(tl.int64) * HEAD_DIM, mask_m, out, HEAD_DIM, BLOCK_D)
        tl.store(partial_lse_ptr + entry, (m + tl.log2(l)) * LN_2, mask=mask_m)


@triton.jit(do_not_specialize=COUNTS)
def past_fwd_long(
    q_ptr,
    k_ptr,
    v_ptr,
    kv_block_start_ptr,
    kv_block_end_ptr,
    order_ptr,
    cu_entries_ptr,
    split_of_ptr,
    cu_splits_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    softmax_scale,
    stride_kn,
    stride_kh,
    num_head_blocks,
    num_kv_blocks,
    num_slots,
    split_size,
    first_token,
    num_tokens,
    first_kv_head,
    num_heads,
    qheads_per_kvhead,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per split of the entries of a head block; a split is one tile of BLOCK_M query rows."""
    split = tl.program_id(0)
    head_block = tl.load(split_of_ptr + split)
    if head_block >= num_head_blocks:
        return
    low, high = entries_of_split(split, head_block, cu_entries_ptr, cu_splits_ptr, split_size)
    kv_head = head_block // num_kv_blocks
    entry, row, mask_m = tile_of_entries(
        low, high, order_ptr, kv_head, num_slots, first_token, num_tokens, first_kv_head, num_heads,
        qheads_per_kvhead, BLOCK_M,
    )  # fmt: skip
    q = load_rows(q_ptr, row * HEAD_DIM, mask_m, HEAD_DIM, BLOCK_D)
    length, base = keys_of_head_block(
        head_block, kv_block_start_ptr, kv_block_end_ptr, num_kv_blocks, stride_kn, stride_kh
    )
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for first in range(0, length, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < length
        k = load_kv(k_ptr + base, offs_n, stride_kn, length, HEAD_DIM, BLOCK_D)
        s = tl.where(mask_n[None, :], dot(q, tl.trans(k)) * (softmax_scale * LOG2_E), float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        p = tl.exp2(s - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, axis=1)
        v = load_kv(v_ptr + base, offs_n, stride_kn, length, HEAD_DIM, BLOCK_D)
        acc = dot(p.to(v.dtype), v, acc * alpha[:, None])
        m = m_new
    store_rows(partial_out_ptr, entry.to(tl.int64) * HEAD_DIM, mask_m, acc / l[:, None], HEAD_DIM, BLOCK_D)
    tl.store(partial_lse_ptr + entry, (m + tl.log2(l)) * LN_2, mask=mask_m)


def _kernel(q_TND: Tensor, longest: int) -> str:
    short = config.holds_kv_block_for("past_fwd_short", q_TND, longest)
    return "past_fwd_short" if short else "past_fwd_long"


def forward_cut(q_TND: Tensor, longest: int) -> Cut:
    """How `past_forward` wants the entries cut, where the longest kv block has so many keys."""
    name = _kernel(q_TND, longest)
    return Cut(config.split_size(name, config.tiles_for(name, q_TND, longest)))


def past_forward(
    q_TND: Tensor,
    keys: Keys,
    index: Index,
    fragment: DeviceFragment,
    softmax_scale: float,
    partial_out_ED: Tensor,
    partial_lse_E: Tensor,
) -> None:
    """Write output and log-sum-exp of every attended entry of a pass; the others are left as they are.

    Args:
        keys: with k and v of equal strides and a contiguous last dimension.
        index: cut by `forward_cut`.
        partial_out_ED: [E, D] in q's dtype.
        partial_lse_E: fp32 [E].
    """
    work, kv_blocks = index.work, fragment.kv_blocks
    name = _kernel(q_TND, kv_blocks.longest)
    kernel = past_fwd_short if name == "past_fwd_short" else past_fwd_long
    tiles = config.tiles_for(name, q_TND, kv_blocks.longest)
    (splits,), first = index.splits, work.kv_heads.start
    kernel[(splits.count,)](
        q_TND, keys.k[:, first:], keys.v[:, first:], kv_blocks.start, kv_blocks.end,
        index.order, index.cu_entries, splits.split_of, splits.cu_splits, partial_out_ED, partial_lse_E,
        softmax_scale, keys.k.stride(0), keys.k.stride(1),
        index.num_head_blocks, index.num_kv_blocks, work.num_slots, splits.size,
        work.tokens.start, work.num_tokens, work.first_kv_head, q_TND.shape[1], work.qheads_per_kvhead,
        **tiles,
    )  # fmt: skip
