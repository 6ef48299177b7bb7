"""Partial results combined in a fixed order, so that no sum depends on what ran first.

A row's partial outputs and its partial dq are those of its slots. In a whole pack `causal_fwd` and `causal_dq` combine
them as they finish a row (`combine_partials`, `add_partials`); for fragments `combine_out` and `combine_dq` do it
by themselves, into existing results. A kv block's partial dk and dv are those of the splits of its entries: each
split writes its sums for all keys, and `combine_dkdv` adds them one after the other, those of kv blocks that start at
the same row together. A block that many rows want has thousands of splits: where it has more than `config.ADD_AT_ONCE`,
`add_groups` has first added every so many of them, all groups at once. The shape of the sum follows from the number of
splits alone.

Traffic: D elements per slot of a row; for dk and dv 8 D bytes read per partial row, 16 D bytes read and written per key
row.

Legend: T tokens, N query heads, S key rows, G kv heads of the pass, D head size, E entries of a pass, W rows of all
partial dk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_megatron.ops.triton import config
from moba_megatron.ops.triton.common import COUNTS, LN_2, LOG2_E, load_rows, query_rows, second_id, store_rows
from moba_megatron.ops.triton.fragments import Spans
from moba_megatron.ops.triton.index import Index
from moba_megatron.ops.triton.passes import Pass


@triton.jit
def combine_partials(acc, m, l, partial_out_ptr, partial_lse_ptr, entry_kv_block_ptr, entry, mask_m, num_slots,
                     HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Combine a row's partial outputs, in slot order, with its running (acc, m, l) by log-sum-exp in base 2.

    Args:
        entry [rows]: int64 number of each row's first entry; entries whose kv block is -1 were never written.
    """
    for slot in range(0, num_slots):
        attended = mask_m & (tl.load(entry_kv_block_ptr + entry + slot, mask=mask_m, other=-1) >= 0)
        lse = tl.load(partial_lse_ptr + entry + slot, mask=attended, other=float("-inf")) * LOG2_E
        partial_out = load_rows(partial_out_ptr, (entry + slot) * HEAD_DIM, attended, HEAD_DIM, BLOCK_D)
        m_new = tl.maximum(m, lse)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2(m - shift)
        p = tl.exp2(lse - shift)
        acc = acc * alpha[:, None] + partial_out.to(tl.float32) * p[:, None]
        l = l * alpha + p
        m = m_new
    return acc, m, l


@triton.jit
def add_partials(dq, partial_dq_ptr, entry_kv_block_ptr, entry, mask_m, num_slots,
                 HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Add a row's partial dq in slot order; arguments as for `combine_partials`."""
    for slot in range(0, num_slots):
        attended = mask_m & (tl.load(entry_kv_block_ptr + entry + slot, mask=mask_m, other=-1) >= 0)
        dq += load_rows(partial_dq_ptr, (entry + slot) * HEAD_DIM, attended, HEAD_DIM, BLOCK_D).to(tl.float32)
    return dq


@triton.jit(do_not_specialize=COUNTS)
def combine_out(
    partial_out_ptr,
    partial_lse_ptr,
    entry_kv_block_ptr,
    out_ptr,
    lse_ptr,
    num_rows,
    num_slots,
    first_token,
    num_tokens,
    first_kv_head,
    num_heads,
    qheads_per_kvhead,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program per tile of rows of the pass: combines their partial outputs with out and lse, in place."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < num_rows
    token = offs_m // qheads_per_kvhead
    kv_head = token // num_tokens
    origin = (first_token - kv_head * num_tokens) * num_heads + (first_kv_head + kv_head) * qheads_per_kvhead
    row = query_rows(origin, offs_m, token, num_heads, qheads_per_kvhead)
    m = tl.load(lse_ptr + row, mask=mask_m, other=float("-inf")) * LOG2_E
    l = tl.where(m == float("-inf"), 0.0, 1.0)
    acc = load_rows(out_ptr, row * HEAD_DIM, mask_m, HEAD_DIM, BLOCK_D).to(tl.float32) * l[:, None]
    acc, m, l = combine_partials(
        acc, m, l, partial_out_ptr, partial_lse_ptr, entry_kv_block_ptr, offs_m * num_slots, mask_m, num_slots,
        HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    empty = l == 0
    store_rows(out_ptr, row * HEAD_DIM, mask_m, acc / tl.where(empty, 1.0, l)[:, None], HEAD_DIM, BLOCK_D)
    lse = tl.where(empty, float("-inf"), (m + tl.log2(tl.where(empty, 1.0, l))) * LN_2)
    tl.store(lse_ptr + row, lse, mask=mask_m)


@triton.jit(do_not_specialize=COUNTS)
def combine_dq(
    partial_dq_ptr,
    entry_kv_block_ptr,
    dq_ptr,
    num_rows,
    num_slots,
    first_token,
    num_tokens,
    first_kv_head,
    num_heads,
    qheads_per_kvhead,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program per tile of rows of the pass: adds their partial dq to dq, in place."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < num_rows
    token = offs_m // qheads_per_kvhead
    kv_head = token // num_tokens
    origin = (first_token - kv_head * num_tokens) * num_heads + (first_kv_head + kv_head) * qheads_per_kvhead
    row = query_rows(origin, offs_m, token, num_heads, qheads_per_kvhead)
    dq = load_rows(dq_ptr, row * HEAD_DIM, mask_m, HEAD_DIM, BLOCK_D).to(tl.float32)
    dq = add_partials(dq, partial_dq_ptr, entry_kv_block_ptr, offs_m * num_slots, mask_m, num_slots, HEAD_DIM, BLOCK_D)
    store_rows(dq_ptr, row * HEAD_DIM, mask_m, dq, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=COUNTS)
def add_groups(
    partial_dk_ptr,
    partial_dv_ptr,
    kv_block_start_ptr,
    kv_block_end_ptr,
    split_of_ptr,
    cu_splits_ptr,
    partial_start_ptr,
    num_head_blocks,
    num_kv_blocks,
    num_splits,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Two programs per (GROUP adjacent splits, key tile): the sums of a group of splits of one head block, in order,
    take the place of the first one's, if the head block has more than GROUP splits.

    Groups are counted from a head block's first split. Among GROUP adjacent splits one group of the first one's head
    block begins, and the first group of the last one's; whatever lies between is too short.
    """
    window, key_tile = tl.program_id(0) // 2 * GROUP, second_id()
    head_block = tl.load(split_of_ptr + window)
    if tl.program_id(0) % 2 == 1:
        other = tl.load(split_of_ptr + tl.minimum(window + GROUP, num_splits) - 1)
        head_block = tl.where(other == head_block, num_head_blocks, other)
    if head_block >= num_head_blocks:
        return
    begin = tl.load(cu_splits_ptr + head_block).to(tl.int32)
    end = tl.load(cu_splits_ptr + head_block + 1).to(tl.int32)
    low = begin + (tl.maximum(window - begin, 0) + (GROUP - 1)) // GROUP * GROUP
    start = tl.load(kv_block_start_ptr + head_block % num_kv_blocks)
    length = (tl.load(kv_block_end_ptr + head_block % num_kv_blocks) - start).to(tl.int32)
    if (end - begin <= GROUP) | (low >= end) | (key_tile * BLOCK_N >= length):
        return
    offs_n = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    target = (tl.load(partial_start_ptr + low) + offs_n) * HEAD_DIM
    dk = load_rows(partial_dk_ptr, target, offs_n < length, HEAD_DIM, BLOCK_D)
    dv = load_rows(partial_dv_ptr, target, offs_n < length, HEAD_DIM, BLOCK_D)
    # The rows of a head block's splits follow each other.
    for more in range(1, tl.minimum(GROUP, end - low)):
        source = target + more * length.to(tl.int64) * HEAD_DIM
        dk += load_rows(partial_dk_ptr, source, offs_n < length, HEAD_DIM, BLOCK_D)
        dv += load_rows(partial_dv_ptr, source, offs_n < length, HEAD_DIM, BLOCK_D)
    store_rows(partial_dk_ptr, target, offs_n < length, dk, HEAD_DIM, BLOCK_D)
    store_rows(partial_dv_ptr, target, offs_n < length, dv, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=COUNTS)
def combine_dkdv(
    partial_dk_ptr,
    partial_dv_ptr,
    kv_block_start_ptr,
    kv_block_end_ptr,
    cu_splits_ptr,
    partial_start_ptr,
    dk_ptr,
    dv_ptr,
    result_dk_ptr,
    result_dv_ptr,
    num_kv_blocks,
    num_kv_heads,
    num_result_heads,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (head block, key tile): adds all splits of the kv blocks that start where this one does, in
    order, to dk and dv [S, num_kv_heads, D], and writes the sums as rows of `num_result_heads` heads.

    Only the first of such kv blocks does the work.
    """
    head_block, key_tile = tl.program_id(0), second_id()
    kv_head, kv_block = head_block // num_kv_blocks, head_block % num_kv_blocks
    start = tl.load(kv_block_start_ptr + kv_block)
    before = tl.load(kv_block_start_ptr + kv_block - 1, mask=kv_block > 0, other=-1)
    if (before == start) | (tl.load(kv_block_end_ptr + kv_block) == start):
        return
    offs_n = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    longest = tl.full([], 0, tl.int32)
    more = kv_block < num_kv_blocks
    while more:
        length = (tl.load(kv_block_end_ptr + kv_block) - start).to(tl.int32)
        longest = tl.maximum(longest, length)
        low, high = tl.load(cu_splits_ptr + head_block), tl.load(cu_splits_ptr + head_block + 1)
        if key_tile * BLOCK_N >= length:
            high = low
        # The rows of a head block's splits follow each other.
        first = tl.load(partial_start_ptr + low, mask=low < high, other=0)
        for split in range(0, high - low, tl.where(high - low > GROUP, GROUP, 1)):
            source = (first + split * length + offs_n) * HEAD_DIM
            dk += load_rows(partial_dk_ptr, source, offs_n < length, HEAD_DIM, BLOCK_D)
            dv += load_rows(partial_dv_ptr, source, offs_n < length, HEAD_DIM, BLOCK_D)
        kv_block += 1
        head_block += 1
        more = tl.load(kv_block_start_ptr + kv_block, mask=kv_block < num_kv_blocks, other=-1) == start
    target = ((start + offs_n) * num_kv_heads + kv_head) * HEAD_DIM
    mask_n = offs_n < longest
    dk += load_rows(dk_ptr, target, mask_n, HEAD_DIM, BLOCK_D)
    dv += load_rows(dv_ptr, target, mask_n, HEAD_DIM, BLOCK_D)
    result = ((start + offs_n) * num_result_heads + kv_head) * HEAD_DIM
    store_rows(result_dk_ptr, result, mask_n, dk, HEAD_DIM, BLOCK_D)
    store_rows(result_dv_ptr, result, mask_n, dv, HEAD_DIM, BLOCK_D)


def combine_forward(work: Pass, partials: tuple[Tensor, Tensor, Tensor], out_TND: Tensor, lse_TN: Tensor) -> None:
    """Combine partial outputs (as for `causal.causal_forward`) with out and lse of all rows of the pass, in place."""
    tiles = config.tiles_for("combine_out", partials[0])
    combine_out[(triton.cdiv(work.num_rows, tiles["BLOCK_M"]),)](
        *partials, out_TND, lse_TN, work.num_rows, work.num_slots,
        work.tokens.start, work.num_tokens, work.first_kv_head, out_TND.shape[1], work.qheads_per_kvhead,
        **tiles,
    )  # fmt: skip


def combine_block_lse(work: Pass, partials: tuple[Tensor, Tensor, Tensor], block_lse_TNK: Tensor) -> None:
    """Combine the log-sum-exps of a pass's entries with those of their blocks, fp32 [T, N, K], in place; a slot of the
    own block stays out. By PyTorch's operations on single elements: 16 bytes an entry, where a partial output has D
    elements."""
    num_past = block_lse_TNK.shape[2]
    _, lse_E, kv_blocks_E = partials
    # Entries whose kv block is -1 were never written.
    lse_GTRK = lse_E.masked_fill(kv_blocks_E < 0, -torch.inf).view(
        work.num_kv_heads, work.num_tokens, work.qheads_per_kvhead, work.num_slots
    )
    first = work.first_kv_head * work.qheads_per_kvhead
    heads = slice(first, first + work.num_kv_heads * work.qheads_per_kvhead)
    whole_tHK = block_lse_TNK[work.tokens, heads]
    partial_tHK = lse_GTRK[..., :num_past].transpose(0, 1).reshape(whole_tHK.shape)
    whole_tHK.copy_(torch.logaddexp(whole_tHK, partial_tHK))


def combine_backward_dq(work: Pass, partials: tuple[Tensor, Tensor], dq_TND: Tensor) -> None:
    """Add partial dq (as for `backward_dq.causal_backward_dq`) to dq of all rows of the pass."""
    tiles = config.tiles_for("combine_dq", partials[0])
    combine_dq[(triton.cdiv(work.num_rows, tiles["BLOCK_M"]),)](
        *partials, dq_TND, work.num_rows, work.num_slots,
        work.tokens.start, work.num_tokens, work.first_kv_head, dq_TND.shape[1], work.qheads_per_kvhead,
        **tiles,
    )  # fmt: skip


def combine_backward_dkdv(
    index: Index,
    kv_blocks: Spans,
    partial_dk: Tensor,
    partial_dv: Tensor,
    dk_SGD: Tensor,
    dv_SGD: Tensor,
    finished: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Add the partial dk and dv fp32 [W, D] of the splits of the index's first cut to fp32 dk and dv [S, G, D].

    Args:
        finished: contiguous dk and dv of all kv heads, [S, all kv heads, D] in any dtype, into which the sums go
            instead, rounded once; the kv blocks then cover all rows.
    """
    tiles, work, splits = config.tiles_for("combine_dkdv", dk_SGD), index.work, index.splits[0]
    key_tiles = triton.cdiv(kv_blocks.longest, tiles["BLOCK_N"])
    # A row chooses a kv block once at most.
    if triton.cdiv(work.num_tokens * work.qheads_per_kvhead, splits.size) > config.ADD_AT_ONCE:
        add_groups[(2 * triton.cdiv(splits.count, config.ADD_AT_ONCE), *config.spread(key_tiles))](
            partial_dk, partial_dv, kv_blocks.start, kv_blocks.end, splits.split_of, splits.cu_splits,
            index.partial_start, index.num_head_blocks, index.num_kv_blocks, splits.count,
            GROUP=config.ADD_AT_ONCE, **tiles,
        )  # fmt: skip
    first, results = (0, (dk_SGD, dv_SGD)) if finished is None else (work.kv_heads.start, finished)
    combine_dkdv[(index.num_head_blocks, *config.spread(key_tiles))](
        partial_dk, partial_dv, kv_blocks.start, kv_blocks.end, splits.cu_splits, index.partial_start,
        dk_SGD, dv_SGD, *(x[:, first:] for x in results), index.num_kv_blocks, work.num_kv_heads, results[0].shape[1],
        GROUP=config.ADD_AT_ONCE, **tiles,
    )  # fmt: skip
