"""Backward, dk and dv: of past blocks and of causal spans, a key tile at a time.

A program holds a tile of keys and values in fp32 sums and walks query rows: those of a split of a kv block's entries,
or the rows of a causal span from the tile's first token on. With the *global* lse and delta exp(s - lse) is the true
probability, so the sums of all programs add up. If a kv block fits one key tile, the same scores give the partial dq of
each entry, which is written at the entry's place (`WRITE_DQ`); longer blocks leave dq to `backward_dq`.

A split's sums are written to memory, and `combine_dkdv` adds those of a key tile in the order of splits: no sum depends
on what ran first.

Traffic per entry: a row of q and of do read and, with `WRITE_DQ`, a row of dq written, 3 D elements; per split B rows
of sums, 16 B D bytes. Splits hold at least four times as many entries as a kv block has keys, so that this is at most
half of the partial dq in bf16. Products per entry: 4 B D multiply-adds, 5 B D with dq.

Legend: S key rows, G kv heads of the pass, D head size, B keys of a kv block, E entries of a pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_megatron.ops.fragments import Keys
from moba_megatron.ops.triton import config
from moba_megatron.ops.triton.combine import combine_backward_dkdv
from moba_megatron.ops.triton.common import (
    COUNTS,
    LOG2_E,
    bounds_of,
    dot,
    load_kv,
    load_rows,
    query_rows,
    quotient,
    safe_lse,
    second_id,
    store_rows,
)
from moba_megatron.ops.triton.fragments import DeviceFragment
from moba_megatron.ops.triton.index import Cut, Index, entries_of_split, keys_of_head_block, tile_of_entries
from moba_megatron.ops.triton.passes import Pass, QueryRows
from moba_megatron.ops.triton.splits import cut_spans


@triton.jit
def dkdv_step(k, v, q, do, lse, delta, softmax_scale, mask, dk, dv):
    """Add one query tile to dk (not yet scaled) and dv of a key tile.

    Args:
        lse: infinite for rows outside the tile, so that their probability is 0.
        mask: bool, broadcastable to [keys, rows], which rows see which keys; None: all. Results for padded keys are
            then ignored.

    Returns:
        dk, dv, and ds [keys, rows], not yet scaled.
    """
    s = dot(k, tl.trans(q)) * (softmax_scale * LOG2_E)
    p = tl.exp2(s - safe_lse(lse)[None, :])
    if mask is not None:
        p = tl.where(mask, p, 0.0)
    dv = dot(p.to(do.dtype), do, dv)
    dp = dot(v, tl.trans(do))
    ds = p * (dp - delta[None, :])
    ds = ds.to(q.dtype)
    return dot(ds, q, dk), dv, ds


@triton.jit(do_not_specialize=COUNTS)
def past_dkdv(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    kv_block_start_ptr,
    kv_block_end_ptr,
    order_ptr,
    cu_entries_ptr,
    split_of_ptr,
    cu_splits_ptr,
    partial_start_ptr,
    partial_dk_ptr,
    partial_dv_ptr,
    partial_dq_ptr,
    softmax_scale,
    stride_kn,
    stride_kh,
    num_head_blocks,
    num_kv_blocks,
    num_slots,
    num_splits,
    split_size,
    first_token,
    num_tokens,
    first_kv_head,
    num_heads,
    qheads_per_kvhead,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WRITE_DQ: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (key tile of a kv block, split of its entries). The programs of a split run together, so that
    its rows are read from memory once and then from cache."""
    key_tile, split = tl.program_id(0), second_id()
    if split >= num_splits:
        return
    head_block = tl.load(split_of_ptr + split)
    if head_block >= num_head_blocks:
        return
    kv_head = head_block // num_kv_blocks
    length, base = keys_of_head_block(
        head_block, kv_block_start_ptr, kv_block_end_ptr, num_kv_blocks, stride_kn, stride_kh
    )
    offs_n = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if key_tile * BLOCK_N >= length:
        return
    low, high = entries_of_split(split, head_block, cu_entries_ptr, cu_splits_ptr, split_size)
    k = load_kv(k_ptr + base, offs_n, stride_kn, length, HEAD_DIM, BLOCK_D)
    v = load_kv(v_ptr + base, offs_n, stride_kn, length, HEAD_DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for first in range(low, high, BLOCK_M):
        entry, row, mask_m = tile_of_entries(
            first, high, order_ptr, kv_head, num_slots, first_token, num_tokens, first_kv_head, num_heads,
            qheads_per_kvhead, BLOCK_M,
        )  # fmt: skip
        q = load_rows(q_ptr, row * HEAD_DIM, mask_m, HEAD_DIM, BLOCK_D)
        do = load_rows(do_ptr, row * HEAD_DIM, mask_m, HEAD_DIM, BLOCK_D)
        lse = tl.load(lse_ptr + row, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + row, mask=mask_m, other=0.0)
        # Masked keys only affect sums that are never stored, so the mask is needed only when writing dq.
        mask = (offs_n < length)[:, None] if WRITE_DQ else None
        dk, dv, ds = dkdv_step(k, v, q, do, lse, delta, softmax_scale, mask, dk, dv)
        if WRITE_DQ:
            dq = dot(tl.trans(ds), k) * softmax_scale
            store_rows(partial_dq_ptr, entry.to(tl.int64) * HEAD_DIM, mask_m, dq, HEAD_DIM, BLOCK_D)
    target = (tl.load(partial_start_ptr + split) + offs_n) * HEAD_DIM
    store_rows(partial_dk_ptr, target, offs_n < length, dk * softmax_scale, HEAD_DIM, BLOCK_D)
    store_rows(partial_dv_ptr, target, offs_n < length, dv, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=COUNTS)
def causal_dkdv(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    span_start_ptr,
    span_end_ptr,
    split_of_ptr,
    cu_splits_ptr,
    dk_ptr,
    dv_ptr,
    softmax_scale,
    stride_kn,
    stride_kh,
    num_spans,
    first_kv_head,
    num_heads,
    qheads_per_kvhead,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (key tile of a span, kv head): writes dk and dv."""
    split, kv_head = tl.program_id(0), tl.program_id(1)
    span = tl.load(split_of_ptr + split)
    if span >= num_spans:
        return
    start, length = bounds_of(span, span_start_ptr, span_end_ptr)
    low = (split - tl.load(cu_splits_ptr + span)).to(tl.int32) * BLOCK_N
    offs_n = low + tl.arange(0, BLOCK_N)
    base = start * stride_kn + kv_head.to(tl.int64) * stride_kh
    k = load_kv(k_ptr + base, offs_n, stride_kn, length, HEAD_DIM, BLOCK_D)
    v = load_kv(v_ptr + base, offs_n, stride_kn, length, HEAD_DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    origin = start * num_heads + (first_kv_head + kv_head) * qheads_per_kvhead
    for first in range(low * qheads_per_kvhead, length * qheads_per_kvhead, BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        mask_m = offs_m < length * qheads_per_kvhead
        row = query_rows(origin, offs_m, quotient(offs_m, qheads_per_kvhead), num_heads, qheads_per_kvhead)
        q = load_rows(q_ptr, row * HEAD_DIM, mask_m, HEAD_DIM, BLOCK_D)
        do = load_rows(do_ptr, row * HEAD_DIM, mask_m, HEAD_DIM, BLOCK_D)
        lse = tl.load(lse_ptr + row, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + row, mask=mask_m, other=0.0)
        mask = (offs_n * qheads_per_kvhead)[:, None] <= offs_m[None, :]
        dk, dv, _ = dkdv_step(k, v, q, do, lse, delta, softmax_scale, mask, dk, dv)
    target = ((start + offs_n) * tl.num_programs(1) + kv_head) * HEAD_DIM
    store_rows(dk_ptr, target, offs_n < length, dk * softmax_scale, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr, target, offs_n < length, dv, HEAD_DIM, BLOCK_D)


def causal_backward_dkdv(
    rows: QueryRows,
    keys: Keys,
    work: Pass,
    fragment: DeviceFragment,
    softmax_scale: float,
    dk_SGD: Tensor,
    dv_SGD: Tensor,
) -> None:
    """Write the causal spans' dk and dv, fp32 [S, G, D], of all rows in causal spans."""
    spans = fragment.causal_spans
    tiles = config.tiles_for("causal_dkdv", rows.q, spans.longest)
    splits = cut_spans(spans, tiles["BLOCK_N"])
    if splits.count == 0:
        return
    first = work.kv_heads.start
    causal_dkdv[(splits.count, work.num_kv_heads)](
        rows.q, keys.k[:, first:], keys.v[:, first:], rows.do, rows.lse, rows.delta, spans.start, spans.end,
        splits.split_of, splits.cu_splits, dk_SGD, dv_SGD,
        softmax_scale, keys.k.stride(0), keys.k.stride(1), spans.count, work.first_kv_head,
        rows.q.shape[1], work.qheads_per_kvhead, **tiles,
    )  # fmt: skip


def writes_dq(q_TND: Tensor, longest: int) -> bool:
    """Whether `past_backward_dkdv` can write dq as well, where the longest kv block has so many keys."""
    return config.holds_kv_block_for("past_dkdv_dq", q_TND, longest)


def dkdv_cut(q_TND: Tensor, longest: int) -> Cut:
    """How `past_backward_dkdv` wants the entries cut, where the longest kv block has so many keys."""
    name = "past_dkdv_dq" if writes_dq(q_TND, longest) else "past_dkdv"
    return Cut(config.split_size(name, config.tiles_for(name, q_TND, longest), longest), longest)


def past_backward_dkdv(
    rows: QueryRows,
    keys: Keys,
    index: Index,
    fragment: DeviceFragment,
    softmax_scale: float,
    dk_SGD: Tensor,
    dv_SGD: Tensor,
    partial_dq_ED: Tensor | None,
    finished: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Add the kv blocks' dk and dv for the entries of a pass to fp32 [S, G, D].

    Args:
        index: whose first cut is `dkdv_cut`.
        partial_dq_ED: where not None, the entries' dq are written there too, in the inputs' dtype (short kv blocks
            only).
        finished: see `combine.combine_backward_dkdv`.
    """
    work, kv_blocks, size = index.work, fragment.kv_blocks, rows.q.shape[2]
    name = "past_dkdv" if partial_dq_ED is None else "past_dkdv_dq"
    tiles = config.tiles_for(name, rows.q, kv_blocks.longest)
    splits = index.splits[0]
    partial_dk, partial_dv = torch.empty(2, index.num_partials, size, dtype=torch.float32, device=rows.q.device)
    key_tiles = triton.cdiv(kv_blocks.longest, tiles["BLOCK_N"])
    first = work.kv_heads.start
    past_dkdv[(key_tiles, *config.spread(splits.count))](
        rows.q, keys.k[:, first:], keys.v[:, first:], rows.do, rows.lse, rows.delta, kv_blocks.start, kv_blocks.end,
        index.order, index.cu_entries, splits.split_of, splits.cu_splits, index.partial_start, partial_dk, partial_dv,
        partial_dk if partial_dq_ED is None else partial_dq_ED, softmax_scale, keys.k.stride(0), keys.k.stride(1),
        index.num_head_blocks, index.num_kv_blocks, work.num_slots, splits.count, splits.size,
        work.tokens.start, work.num_tokens, work.first_kv_head, rows.q.shape[1], work.qheads_per_kvhead,
        WRITE_DQ=partial_dq_ED is not None, **tiles,
    )  # fmt: skip
    combine_backward_dkdv(index, kv_blocks, partial_dk, partial_dv, dk_SGD, dv_SGD, finished)
