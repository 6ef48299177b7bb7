"""Decoding: one query per sequence against cached keys, values and block summaries.

The query chooses past blocks among the cached summaries as in training; where sequences and key heads are too few to
fill the chip, the blocks are cut into parts, each keeps its best, and the best of these are taken: the same choice.
Then each (sequence, head, piece of a chosen block) is a program of its own that reads the piece's keys and values once,
and the partial outputs are merged by log-sum-exp. There is no index: a token's heads choose few blocks, and what they
share they share in cache.

Decoding equals one forward pass over the whole text: past blocks are complete, and the block of the query's own token
is always attended, as far as it is filled. A summary is needed from the token on that completes its block;
`complete_summaries` writes it.

Traffic: the summaries of the sequences' past blocks, M G D fp32, and K B rows of keys and values per head.

Legend: b sequences, S tokens a cache has room for, N query heads, G key heads, D head size, B block size, M blocks a
cache has room for, K blocks per query (its own counted), P pieces of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_megatron.ops.triton import config
from moba_megatron.ops.triton.combine import merge_rows
from moba_megatron.ops.triton.common import COUNTS, LN_2, LOG2_E, load_keys
from moba_megatron.ops.triton.devices import on_its_device
from moba_megatron.ops.triton.routing import MOST_PAST, select_blocks
from moba_megatron.ops.triton.summaries import mean_rows

# Keys that one program reads; longer blocks are read by several.
PIECE = 512


@triton.jit(do_not_specialize=COUNTS)
def attend_cached(
    q,
    k,
    v,
    ids,
    lengths,
    part,
    part_lse,
    softmax_scale,
    k_sequence,
    k_row,
    k_head,
    slots,
    block_size,
    piece_size,
    pieces,
    num_heads,
    group_size,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (sequence, head, piece of a slot's block): writes its partial output, 0 and -inf for none."""
    places = slots * pieces
    row, place = (tl.program_id(0) // places).to(tl.int64), tl.program_id(0) % places
    sequence, head = row // num_heads, (row % num_heads).to(tl.int32)
    block = tl.load(ids + row * slots + place // pieces)
    begin = block * block_size + place % pieces * piece_size
    stop = tl.minimum(begin + piece_size, (block + 1) * block_size)
    length = tl.maximum(tl.minimum(stop, tl.load(lengths + sequence).to(tl.int32)) - begin, 0)
    length = tl.where(block < 0, 0, length)
    column = tl.arange(0, WIDTH)
    query = tl.load(q + row * HEAD_SIZE + column, mask=column < HEAD_SIZE, other=0.0).to(tl.float32)
    base = sequence * k_sequence + begin.to(tl.int64) * k_row + (head // group_size).to(tl.int64) * k_head
    # Softmax of one row, kept as vectors of one element.
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], dtype=tl.float32)
    acc = tl.zeros([WIDTH], dtype=tl.float32)
    for first in range(0, length, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        keys = load_keys(k + base, key, k_row, length, HEAD_SIZE, WIDTH)
        score = tl.sum(keys.to(tl.float32) * query[None, :], axis=1) * (softmax_scale * LOG2_E)
        score = tl.where(key < length, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, axis=0))
        weight = tl.exp2(score - higher)
        keep = tl.exp2(top - higher)
        total = total * keep + tl.sum(weight, axis=0)
        values = load_keys(v + base, key, k_row, length, HEAD_SIZE, WIDTH)
        acc = acc * keep + tl.sum(values.to(tl.float32) * weight[:, None], axis=0)
        top = higher
    filled = tl.where(total == 0, 1.0, total)
    entry = row * places + place
    tl.store(part + entry * HEAD_SIZE + column, acc / filled, mask=column < HEAD_SIZE)
    tl.store(part_lse + entry + tl.arange(0, 1), (top + tl.log2(filled)) * LN_2)


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
    group_size = heads // k.shape[2]
    ids = choose_cached(q, summaries_bMGD, lengths, block_size, top_k)
    pieces = triton.cdiv(min(block_size, k.shape[1]), PIECE)
    slots = ids.shape[2]
    part = torch.empty(sequences, heads, slots * pieces, size, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(part.shape[:3], dtype=torch.float32, device=q.device)
    attend_cached[(sequences * heads * slots * pieces,)](
        q, k, v, ids, lengths, part, part_lse, softmax_scale, *k.stride()[:3], slots,
        block_size, triton.cdiv(block_size, pieces), pieces, heads, group_size,
        **config.tiles_for("attend_cached", q),
    )  # fmt: skip
    out = torch.zeros_like(q, dtype=torch.float32)
    lse = torch.full((sequences, heads), -torch.inf, dtype=torch.float32, device=q.device)
    units = ids.repeat_interleave(pieces, dim=-1)
    tiles = config.tiles_for("merge_rows", q)
    merge_rows[(triton.cdiv(sequences * heads, tiles["BLOCK_M"]),)](
        part, part_lse, units, out, lse, sequences * heads, slots * pieces, 0, sequences, 0, heads, heads, **tiles
    )  # fmt: skip
    return out.to(q.dtype)


def choose_cached(q_bND: Tensor, summaries_bMGD: Tensor, lengths_b: Tensor, block_size: int, top_k: int) -> Tensor:
    """int32 [b, N, K]: chosen past blocks by falling score, -1 where fewer, and the query's own block last."""
    sequences, heads, size = q_bND.shape
    most, groups = summaries_bMGD.shape[1:3]
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
    parts, part_blocks = config.decoding_parts(sequences * groups, most)
    ids = torch.empty(sequences, heads, parts, num_past, dtype=torch.int32, device=q_bND.device)
    scores = torch.empty(ids.shape, dtype=torch.float32, device=q_bND.device)
    first = torch.arange(0, sequences * most, most, device=q_bND.device)
    group_size = heads // groups
    tiles = config.route_tiles(torch.float32, size, num_past, group_size, config.architecture_of(q_bND))
    select_blocks[(sequences, groups, parts)](
        q_bND.float(), summaries_bMGD.float().contiguous(), first, own.to(torch.int64), ids, scores,
        sequences * group_size, heads, sequences * most, num_past, 1.0, group_size, group_size, part_blocks,
        SPLIT=True, **tiles,
    )  # fmt: skip
    return torch.cat([_best_of_parts(ids, scores), own_bN1], dim=-1)


def _best_of_parts(ids_bNPK: Tensor, scores_bNPK: Tensor) -> Tensor:
    """[b, N, K]: the best of the best of each of P parts. Parts follow each other by block number and each is in order,
    so that a stable sort gives equal scores to the lower number."""
    parts, num_past = ids_bNPK.shape[2:]
    if parts == 1:
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
