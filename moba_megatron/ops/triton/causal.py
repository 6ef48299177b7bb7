"""Forward of causal spans: own blocks, in a whole pack.

`causal_fwd` holds a tile of query rows of one kv head, streams the span's keys up to the tile's last token, and then,
without writing anything in between, combines the row's partial outputs of past blocks in slot order: no partial output
of the own block exists.

Traffic per query row: q and out once, D elements of a partial output per slot, and the span's keys and values from
cache.

Legend: T tokens, N query heads, D head size, E entries of a pass.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moba_megatron.ops.fragments import Keys
from moba_megatron.ops.triton import config
from moba_megatron.ops.triton.combine import combine_partials
from moba_megatron.ops.triton.common import (
    COUNTS,
    LN_2,
    LOG2_E,
    bounds_of,
    dot,
    load_kv,
    load_rows,
    query_rows,
    rows_of_span,
    store_rows,
)
from moba_megatron.ops.triton.fragments import DeviceFragment
from moba_megatron.ops.triton.passes import Pass
from moba_megatron.ops.triton.splits import cut_spans


@triton.jit(do_not_specialize=COUNTS)
def causal_fwd(
    q_ptr,
    k_ptr,
    v_ptr,
    span_start_ptr,
    span_end_ptr,
    split_of_ptr,
    cu_splits_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    entry_kv_block_ptr,
    out_ptr,
    lse_ptr,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (split of a span's rows, kv head); only tokens of the pass are written."""
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
    base = start * stride_kn + kv_head.to(tl.int64) * stride_kh
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    last = tl.minimum(tl.max(position, axis=0) + 1, length)
    for first in range(0, last, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        k = load_kv(k_ptr + base, offs_n, stride_kn, length, HEAD_DIM, BLOCK_D)
        s = dot(q, tl.trans(k)) * (softmax_scale * LOG2_E)
        s = tl.where(offs_n[None, :] <= position[:, None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        p = tl.exp2(s - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, axis=1)
        v = load_kv(v_ptr + base, offs_n, stride_kn, length, HEAD_DIM, BLOCK_D)
        acc = dot(p.to(v.dtype), v, acc * alpha[:, None])
        m = m_new
    if COMBINE:
        entry = ((kv_head * num_tokens + start - first_token) * qheads_per_kvhead + offs_m) * num_slots
        acc, m, l = combine_partials(
            acc, m, l, partial_out_ptr, partial_lse_ptr, entry_kv_block_ptr, entry, mask_m, num_slots, HEAD_DIM, BLOCK_D
        )
    store_rows(out_ptr, row * HEAD_DIM, mask_m, acc / l[:, None], HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + row, (m + tl.log2(l)) * LN_2, mask=mask_m)


def causal_forward(
    q_TND: Tensor,
    keys: Keys,
    work: Pass,
    fragment: DeviceFragment,
    softmax_scale: float,
    partials: tuple[Tensor, Tensor, Tensor] | None,
    out_TND: Tensor,
    lse_TN: Tensor,
) -> None:
    """Write out and lse of the pass's rows in causal spans.

    Args:
        partials: partial outputs [E, D], their log-sum-exps fp32 [E] and kv blocks int32 [E], to be combined with these
            rows; None for none.
        out_TND: contiguous, in q's dtype or fp32.
    """
    spans, combine = fragment.causal_spans, partials is not None
    tiles = config.tiles_for("causal_fwd", q_TND, spans.longest)
    splits = cut_spans(spans, tiles["BLOCK_M"], work.qheads_per_kvhead)
    if splits.count == 0:
        return
    first = work.kv_heads.start
    causal_fwd[(splits.count, work.num_kv_heads)](
        q_TND, keys.k[:, first:], keys.v[:, first:], spans.start, spans.end, splits.split_of, splits.cu_splits,
        *(partials if combine else (q_TND, lse_TN, splits.split_of)), out_TND, lse_TN,
        softmax_scale, keys.k.stride(0), keys.k.stride(1), spans.count,
        work.num_slots, work.tokens.start, work.num_tokens, work.first_kv_head, q_TND.shape[1],
        work.qheads_per_kvhead, COMBINE=combine, **tiles,
    )  # fmt: skip
