"""Decoding: one query per sequence against cached keys, values and block summaries.

The query chooses past blocks among the cached summaries as in training; where sequences and kv heads are too few to
fill the chip, the blocks are cut into splits, each keeps its best, and the best of these are taken: the same choice.
Then each (sequence, head, split of a chosen block) is a program of its own that reads the split's keys and values once,
and the partial outputs are combined by log-sum-exp. There is no index: a token's heads choose few blocks, and what they
share they share in cache.

Decoding equals one forward pass over the whole text: past blocks are complete, and the block of the query's own token
is always attended, as far as it is filled. A summary is needed from the token on that completes its block;
`complete_summaries` writes it.

Traffic: the summaries of the sequences' past blocks, M G D fp32, and K B rows of keys and values per head.

Legend: b sequences, S tokens a cache has room for, N query heads, G kv heads, D head size, B block size, M blocks a
cache has room for, K blocks per query (its own counted), P splits of the blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_megatron.ops.router import for_heads
from moba_megatron.ops.selection import MOBA, Selection
from moba_megatron.ops.triton import config
from moba_megatron.ops.triton.combine import combine_out
from moba_megatron.ops.triton.common import COUNTS, LN_2, LOG2_E, load_kv
from moba_megatron.ops.triton.devices import on_its_device
from moba_megatron.ops.triton.routing import MOST_PAST, route
from moba_megatron.ops.triton.summaries import mean_rows

# Keys that one program reads; longer blocks are read by several.
SPLIT_KEYS = 512


@triton.jit(do_not_specialize=COUNTS)
def decode_fwd(
    q_ptr,
    k_ptr,
    v_ptr,
    ids_ptr,
    lengths_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    softmax_scale,
    stride_kb,
    stride_kn,
    stride_kh,
    num_slots,
    block_size,
    split_size,
    num_splits,
    num_heads,
    qheads_per_kvhead,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (sequence, head, split of a slot's block): writes its partial output, 0 and -inf for none."""
    places = num_slots * num_splits
    row, place = (tl.program_id(0) // places).to(tl.int64), tl.program_id(0) % places
    sequence, head = row // num_heads, (row % num_heads).to(tl.int32)
    block = tl.load(ids_ptr + row * num_slots + place // num_splits)
    start = block * block_size + place % num_splits * split_size
    stop = tl.minimum(start + split_size, (block + 1) * block_size)
    length = tl.maximum(tl.minimum(stop, tl.load(lengths_ptr + sequence).to(tl.int32)) - start, 0)
    length = tl.where(block < 0, 0, length)
    offs_d = tl.arange(0, BLOCK_D)
    q = tl.load(q_ptr + row * HEAD_DIM + offs_d, mask=offs_d < HEAD_DIM, other=0.0).to(tl.float32)
    base = sequence * stride_kb + start.to(tl.int64) * stride_kn + (head // qheads_per_kvhead).to(tl.int64) * stride_kh
    # Softmax of one row, kept as vectors of one element.
    m = tl.full([1], float("-inf"), tl.float32)
    l = tl.zeros([1], dtype=tl.float32)
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    for first in range(0, length, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        k = load_kv(k_ptr + base, offs_n, stride_kn, length, HEAD_DIM, BLOCK_D)
        s = tl.sum(k.to(tl.float32) * q[None, :], axis=1) * (softmax_scale * LOG2_E)
        s = tl.where(offs_n < length, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=0))
        p = tl.exp2(s - m_new)
        alpha = tl.exp2(m - m_new)
        l = l * alpha + tl.sum(p, axis=0)
        v = load_kv(v_ptr + base, offs_n, stride_kn, length, HEAD_DIM, BLOCK_D)
        acc = acc * alpha + tl.sum(v.to(tl.float32) * p[:, None], axis=0)
        m = m_new
    l_or_1 = tl.where(l == 0, 1.0, l)
    entry = row * places + place
    tl.store(partial_out_ptr + entry * HEAD_DIM + offs_d, acc / l_or_1, mask=offs_d < HEAD_DIM)
    tl.store(partial_lse_ptr + entry + tl.arange(0, 1), (m + tl.log2(l_or_1)) * LN_2)


@torch.no_grad()
@on_its_device
def decode_cached(
    q_bND: Tensor,
    k_bSGD: Tensor,
    v_bSGD: Tensor,
    summaries_bMGD: Tensor,
    lengths_b: Tensor,
    *,
    block_size: int,
    top_k: int,
    softmax_scale: float,
    selection: Selection = MOBA,
    router_q_bHC: Tensor | None = None,
) -> Tensor:
    """MoBA for the newest token of each sequence; no gradient, nothing is read on the host.

    Args:
        q_bND: queries [b, N, D] of the newest tokens, in bf16, fp16 or fp32.
        k_bSGD, v_bSGD: caches [b, S, G, D] in q's dtype, the newest token's keys and values included.
        summaries_bMGD: fp32 [b, M, G, D], mean keys of the complete blocks of each sequence; others are not looked at.
            M may not be smaller than S // block_size.
        lengths_b: integer [b], tokens in each cache, the newest included; at least 1.
        block_size, top_k: as for `moba_attention`; at most 64 past blocks.
        softmax_scale: factor on the scores.
        selection: top-k of the means, with budgets of the key heads or without.
        router_q_bHC: a router's queries [b, H, C], which choose in place of q; the summaries [b, M, J, C] are then
            those of its keys.

    Returns:
        [b, N, D] in q's dtype.

    Raises:
        ValueError: a dtype, head size or top_k without kernels.
    """
    q, k, v = config.checked(q_bND).contiguous(), config.checked(k_bSGD), config.checked(v_bSGD)
    if k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    lengths = lengths_b.to(torch.int32)
    sequences, heads, size = q.shape
    ids = choose_cached(q if router_q_bHC is None else router_q_bHC, summaries_bMGD, lengths, block_size, top_k)
    selection.within_budgets(ids[..., :-1])
    ids = for_heads(ids, heads)
    splits = triton.cdiv(min(block_size, k.shape[1]), SPLIT_KEYS)
    slots = ids.shape[2]
    partial_out = torch.empty(sequences, heads, slots * splits, size, dtype=torch.float32, device=q.device)
    partial_lse = torch.empty(partial_out.shape[:3], dtype=torch.float32, device=q.device)
    decode_fwd[(sequences * heads * slots * splits,)](
        q, k, v, ids, lengths, partial_out, partial_lse, softmax_scale, *k.stride()[:3], slots,
        block_size, triton.cdiv(block_size, splits), splits, heads, heads // k.shape[2],
        **config.tiles_for("decode_fwd", q),
    )  # fmt: skip
    out = torch.zeros_like(q, dtype=torch.float32)
    lse = torch.full((sequences, heads), -torch.inf, dtype=torch.float32, device=q.device)
    blocks = ids.repeat_interleave(splits, dim=-1)
    tiles = config.tiles_for("combine_out", q)
    combine_out[(triton.cdiv(sequences * heads, tiles["BLOCK_M"]),)](
        partial_out, partial_lse, blocks, out, lse, sequences * heads, slots * splits, 0, sequences, 0, heads, heads,
        **tiles,
    )  # fmt: skip
    return out.to(q.dtype)


def choose_cached(q_bND: Tensor, summaries_bMGD: Tensor, lengths_b: Tensor, block_size: int, top_k: int) -> Tensor:
    """int32 [b, N, K]: chosen past blocks by falling score, -1 where fewer, and the query's own block last."""
    sequences, heads, size = q_bND.shape
    most, num_kv_heads = summaries_bMGD.shape[1:3]
    num_past = min(top_k - 1, most)
    if num_past > MOST_PAST:
        raise ValueError(
            f"the triton backend keeps at most {MOST_PAST} past blocks per query, not {num_past}: lower top_k to "
            f"{MOST_PAST + 1}"
        )
    own = (lengths_b - 1) // block_size
    own_bN1 = own.view(-1, 1, 1).expand(-1, heads, 1)
    if num_past == 0:
        return own_bN1.contiguous()
    # A program takes the rows of one sequence: no other shares its summaries.
    splits, split_size = config.decode_splits(sequences * num_kv_heads, most)
    ids = torch.empty(sequences, heads, splits, num_past, dtype=torch.int32, device=q_bND.device)
    scores = torch.empty(ids.shape, dtype=torch.float32, device=q_bND.device)
    first = torch.arange(0, sequences * most, most, device=q_bND.device)
    qheads_per_kvhead = heads // num_kv_heads
    tiles = config.route_tiles(torch.float32, size, num_past, qheads_per_kvhead, config.architecture_of(q_bND))
    route[(sequences, num_kv_heads, splits)](
        q_bND.float(), summaries_bMGD.float().contiguous(), first, own.to(torch.int64), ids, scores, ids,
        sequences * qheads_per_kvhead, heads, sequences * most, num_past, 1.0, qheads_per_kvhead, qheads_per_kvhead,
        split_size, 0, SPLIT=True, FLAGGED=False, **tiles,
    )  # fmt: skip
    return torch.cat([_best_of_splits(ids, scores), own_bN1], dim=-1)


def _best_of_splits(ids_bNPK: Tensor, scores_bNPK: Tensor) -> Tensor:
    """[b, N, K]: the best of the best of each of P splits. These follow each other by block number and each is in
    order, so that a stable sort gives equal scores to the lower number."""
    splits, num_past = ids_bNPK.shape[2:]
    if splits == 1:
        return ids_bNPK.squeeze(2)
    order = scores_bNPK.flatten(2).sort(dim=-1, descending=True, stable=True).indices
    return ids_bNPK.flatten(2).gather(-1, order[..., :num_past])


@torch.no_grad()
def complete_summaries(k_bSGD: Tensor, summaries_bMGD: Tensor, lengths_b: Tensor, block_size: int) -> None:
    """Write the summary of each block that its sequence's newest token has completed, in place.

    Args:
        k_bSGD: cache [b, S, G, D] in which sequences follow each other without a gap.
        summaries_bMGD: fp32 [b, M, G, D].
        lengths_b: integer [b], tokens in each cache, the newest included.
    """
    sequences, room = k_bSGD.shape[:2]
    block = (lengths_b // block_size - 1).clamp(min=0).to(torch.int64)
    complete = (lengths_b > 0) & (lengths_b % block_size == 0)
    sequence = torch.arange(sequences, device=k_bSGD.device)
    start = sequence * room + block * block_size
    means = mean_rows(k_bSGD.flatten(0, 1), start, start + complete * block_size)
    old = summaries_bMGD[sequence, block]
    summaries_bMGD[sequence, block] = torch.where(complete.view(-1, 1, 1), means, old)
