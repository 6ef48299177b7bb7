"""Backward, delta and dq: of causal spans and of long past blocks.

`causal_dq` holds a tile of query rows, walks the keys of its span, adds the row's partial dq of past blocks in slot
order, and writes the total: in a whole pack only these partial results are in memory twice.

Traffic per query row: q, do and dq once, D elements of a partial dq per slot. Products: 3 B D multiply-adds per entry
of a long kv block.

Legend: T tokens, N query heads, D head size, B keys of a kv block, E entries of a pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_megatron.ops.fragments import Keys
from moba_megatron.ops.triton import config
from moba_megatron.ops.triton.combine import add_partials
from moba_megatron.ops.triton.common import (
    COUNTS,
    LOG2_E,
    bounds_of,
    dot,
    load_kv,
    load_rows,
    query_rows,
    rows_of_span,
    safe_lse,
    store_rows,
)
from moba_megatron.ops.triton.devices import on_its_device
from moba_megatron.ops.triton.fragments import DeviceFragment
from moba_megatron.ops.triton.index import Cut, Index, entries_of_split, keys_of_head_block, tile_of_entries
from moba_megatron.ops.triton.passes import Pass, QueryRows
from moba_megatron.ops.triton.splits import cut_spans


@triton.jit(do_not_specialize=COUNTS)
def output_delta_rows(
    out_ptr, do_ptr, delta_ptr, num_rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr
):
    """One program per tile of rows: inner products of the output and its gradient."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = row < num_rows
    product = load_rows(out_ptr, row * HEAD_DIM, mask_m, HEAD_DIM, BLOCK_D).to(tl.float32)
    product *= load_rows(do_ptr, row * HEAD_DIM, mask_m, HEAD_DIM, BLOCK_D).to(tl.float32)
    tl.store(delta_ptr + row, tl.sum(product, axis=1), mask=mask_m)


@triton.jit
def dq_step(q, do, k, v, lse, delta, softmax_scale, mask, dq):
    """Add one key tile to dq (not yet scaled) of a query tile."""
    s = dot(q, tl.trans(k)) * (softmax_scale * LOG2_E)
    p = tl.where(mask, tl.exp2(s - lse[:, None]), 0.0)
    dp = dot(do, tl.trans(v))
    ds = p * (dp - delta[:, None])
    return dot(ds.to(k.dtype), k, dq)


@triton.jit(do_not_specialize=COUNTS)
def past_dq(
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
    partial_dq_ptr,
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
    """One program per split of the entries of a head block, which is one tile of rows: writes their partial dq."""
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
    do = load_rows(do_ptr, row * HEAD_DIM, mask_m, HEAD_DIM, BLOCK_D)
    lse = safe_lse(tl.load(lse_ptr + row, mask=mask_m, other=0.0))
    delta = tl.load(delta_ptr + row, mask=mask_m, other=0.0)
    length, base = keys_of_head_block(
        head_block, kv_block_start_ptr, kv_block_end_ptr, num_kv_blocks, stride_kn, stride_kh
    )
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for first in range(0, length, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        k = load_kv(k_ptr + base, offs_n, stride_kn, length, HEAD_DIM, BLOCK_D)
        v = load_kv(v_ptr + base, offs_n, stride_kn, length, HEAD_DIM, BLOCK_D)
        mask = (offs_n < length)[None, :]
        dq = dq_step(q, do, k, v, lse, delta, softmax_scale, mask, dq)
    store_rows(partial_dq_ptr, entry.to(tl.int64) * HEAD_DIM, mask_m, dq * softmax_scale, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=COUNTS)
def causal_dq(
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
    partial_dq_ptr,
    entry_kv_block_ptr,
    dq_ptr,
    softmax_scale,
    stride_kn,
    stride_kh,
    num_spans,
    num_slots,
    first_token,
    num_tokens,
    first_kv_head,
    num_heads,
    qheads_per_kvhead,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COMBINE: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (split of a span's rows, kv head); only tokens of the pass are written, or added to."""
    split, kv_head = tl.program_id(0), tl.program_id(1)
    span = tl.load(split_of_ptr + split)
    if span >= num_spans:
        return
    start, length = bounds_of(span, span_start_ptr, span_end_ptr)
    tile = (split - tl.load(cu_splits_ptr + span)).to(tl.int32)
    offs_m, position, mask_m = rows_of_span(tile, start, length, first_token, num_tokens, qheads_per_kvhead, BLOCK_M)
    if tl.max(mask_m.to(tl.int32), axis=0) == 0:
        return
    origin = start * num_heads + (first_kv_head + kv_head) * qheads_per_kvhead
    row = query_rows(origin, offs_m, position, num_heads, qheads_per_kvhead)
    q = load_rows(q_ptr, row * HEAD_DIM, mask_m, HEAD_DIM, BLOCK_D)
    do = load_rows(do_ptr, row * HEAD_DIM, mask_m, HEAD_DIM, BLOCK_D)
    lse = safe_lse(tl.load(lse_ptr + row, mask=mask_m, other=0.0))
    delta = tl.load(delta_ptr + row, mask=mask_m, other=0.0)
    base = start * stride_kn + kv_head.to(tl.int64) * stride_kh
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for first in range(0, tl.minimum(tl.max(position, axis=0) + 1, length), BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        k = load_kv(k_ptr + base, offs_n, stride_kn, length, HEAD_DIM, BLOCK_D)
        v = load_kv(v_ptr + base, offs_n, stride_kn, length, HEAD_DIM, BLOCK_D)
        mask = offs_n[None, :] <= position[:, None]
        dq = dq_step(q, do, k, v, lse, delta, softmax_scale, mask, dq)
    dq *= softmax_scale
    if COMBINE:
        entry = ((kv_head * num_tokens + start - first_token) * qheads_per_kvhead + offs_m) * num_slots
        dq = add_partials(dq, partial_dq_ptr, entry_kv_block_ptr, entry, mask_m, num_slots, HEAD_DIM, BLOCK_D)
    if ADD:
        dq += load_rows(dq_ptr, row * HEAD_DIM, mask_m, HEAD_DIM, BLOCK_D).to(tl.float32)
    store_rows(dq_ptr, row * HEAD_DIM, mask_m, dq, HEAD_DIM, BLOCK_D)


@on_its_device
def output_delta(do_TND: Tensor, out_TND: Tensor) -> Tensor:
    """fp32 [T, N]: inner products of the output and its gradient, both contiguous [T, N, D]."""
    tokens, heads, size = out_TND.shape
    delta_TN = torch.empty(tokens, heads, dtype=torch.float32, device=out_TND.device)
    tiles = config.tiles_for("output_delta_rows", out_TND)
    output_delta_rows[(triton.cdiv(tokens * heads, tiles["BLOCK_M"]),)](
        out_TND, do_TND, delta_TN, tokens * heads, **tiles
    )
    return delta_TN


def dq_cut(q_TND: Tensor, longest: int) -> Cut:
    """How `past_backward_dq` wants the entries cut, where the longest kv block has so many keys."""
    return Cut(config.split_size("past_dq", config.tiles_for("past_dq", q_TND, longest)))


def past_backward_dq(
    rows: QueryRows,
    keys: Keys,
    index: Index,
    fragment: DeviceFragment,
    softmax_scale: float,
    partial_dq_ED: Tensor,
) -> None:
    """Write the partial dq of every attended entry of a pass, in the inputs' dtype. The last cut of the index is
    `dq_cut`."""
    work, kv_blocks = index.work, fragment.kv_blocks
    tiles = config.tiles_for("past_dq", rows.q, kv_blocks.longest)
    splits, first = index.splits[-1], work.kv_heads.start
    past_dq[(splits.count,)](
        rows.q, keys.k[:, first:], keys.v[:, first:], rows.do, rows.lse, rows.delta, kv_blocks.start, kv_blocks.end,
        index.order, index.cu_entries, splits.split_of, splits.cu_splits, partial_dq_ED,
        softmax_scale, keys.k.stride(0), keys.k.stride(1),
        index.num_head_blocks, index.num_kv_blocks, work.num_slots, splits.size,
        work.tokens.start, work.num_tokens, work.first_kv_head, rows.q.shape[1], work.qheads_per_kvhead,
        **tiles,
    )  # fmt: skip


def causal_backward_dq(
    rows: QueryRows,
    keys: Keys,
    work: Pass,
    fragment: DeviceFragment,
    softmax_scale: float,
    partials: tuple[Tensor, Tensor] | None,
    dq_TND: Tensor,
    add: bool,
) -> None:
    """Write dq of the pass's rows in causal spans, or add to it.

    Args:
        partials: partial dq [E, D] and kv blocks int32 [E], added in; None for none.
        dq_TND: contiguous; fp32 where `add`, else any floating dtype.
    """
    spans, combine = fragment.causal_spans, partials is not None
    tiles = config.tiles_for("causal_dq", rows.q, spans.longest)
    splits = cut_spans(spans, tiles["BLOCK_M"], work.qheads_per_kvhead)
    if splits.count == 0:
        return
    first = work.kv_heads.start
    causal_dq[(splits.count, work.num_kv_heads)](
        rows.q, keys.k[:, first:], keys.v[:, first:], rows.do, rows.lse, rows.delta, spans.start, spans.end,
        splits.split_of, splits.cu_splits, *(partials if combine else (rows.q, splits.split_of)), dq_TND,
        softmax_scale, keys.k.stride(0), keys.k.stride(1), spans.count,
        work.num_slots, work.tokens.start, work.num_tokens, work.first_kv_head, rows.q.shape[1],
        work.qheads_per_kvhead, COMBINE=combine, ADD=add, **tiles,
    )  # fmt: skip
