"""Screening: one cheap product finds the blocks that cannot be among a query's best; the others are scored exactly.

**Cheap.** Less their average c, the means m of a kv head are rounded to one plane p in the queries' dtype. The average
is one vector for all blocks of a head, so that it shifts all scores of a query row alike, by q c, and changes no order;
in a pack it is the average over all documents. What it takes away is what all keys have in common, which would make the
rounding error of p large beside what tells the blocks apart.

**Bound.** Let t = q (m - c) and s what the matrix unit returns for q p. With r = m - c - p, |t - s| <= e = |q| b,
where b = |r| + a |p| bounds the rounding of the plane (Cauchy-Schwarz) and all else: a matrix unit cuts every addend
off at some 23 bits below the largest number of its sum, at most 2 D 2^-23 |q| |p| for D addends and partial sums; m - c
in fp32 is off by 2^-24 (|p| + |r|), s - e and s + e by 2^-23 |q| |p|. Hence a = (D + 4) 2^-22. Norms are enlarged by
2^-9, more than their own rounding. Each block has its own b: one outlier, as the first block often is, widens no
other's.

**Choice.** A first walk over the blocks keeps for every column of a tile the largest s - e that it has met. The K-th
largest of these, over columns, is theta: K different blocks have t >= theta. A second walk lists all blocks with
s + e >= theta; one that is not listed has t < theta, so K others are better, and it wins no tie. Blocks spread over 4 K
columns or more, so that theta is the score of about the 1.15 K-th best, less e: a list of 2 K, rounded up to a power of
two, mostly holds them. The listed blocks are scored in fp32 from the means themselves, which is off by at most
(log2 D + 1) 2^-24 sum |q_d m_d|, and ordered: higher score first, then lower number. NaN is never chosen, nor a block
whose mean is not finite.

**Otherwise.** Where more blocks are listed than there is room for, or |q| is so small or large that e might vanish or
overflow, the row is counted in the flag of its tile, and `routing` chooses for flagged tiles anew.

Traffic: per tile of 128 rows the plane twice, per row some 1.15 K rows of means in fp32; most of it from cache.

Legend: T tokens, N query heads, G kv heads, D head size, M blocks, K past blocks per query.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_megatron.ops.layout import TokenBlocks
from moba_megatron.ops.triton import config
from moba_megatron.ops.triton.common import COUNTS, NO_BLOCK, best_of, dot, load_rows, query_rows, quotient, row_norms
from moba_megatron.ops.triton.summaries import centred_plane

# Norms of queries for which e neither vanishes nor overflows: `summaries` keeps b above 2^-50 and p below 2^50.
LEAST_NORM = tl.constexpr(2.0**-63)
LARGEST_NORM = tl.constexpr(2.0**63)


@triton.jit
def _plane(centred_ptr, offs_n, high, kv_head, num_kv_heads, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    place = (offs_n.to(tl.int64) * num_kv_heads + kv_head) * HEAD_DIM
    return load_rows(centred_ptr, place, offs_n < high, HEAD_DIM, BLOCK_D)


@triton.jit
def _errors(bounds_ptr, norm, offs_n, high, kv_head, num_kv_heads):
    """e of every row and block of a tile; NaN for blocks that are never chosen."""
    bound = tl.load(bounds_ptr + offs_n.to(tl.int64) * num_kv_heads + kv_head, mask=offs_n < high, other=0.0)
    return norm[:, None] * bound[None, :]


@triton.jit(do_not_specialize=COUNTS)
def screen(
    q_ptr,
    means_ptr,
    centred_ptr,
    bounds_ptr,
    first_block_ptr,
    block_ptr,
    ids_ptr,
    flags_ptr,
    num_rows,
    num_heads,
    num_past,
    qheads_per_kvhead,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (tile of query rows, kv head): writes their ids, and in the tile's flag how many rows have none
    that are proven; see the module. `KEEP` is the room of a row's list."""
    kv_head, num_kv_heads = tl.program_id(1), tl.num_programs(1)
    first_row = tl.program_id(0) * BLOCK_M
    offs_m = first_row + tl.arange(0, BLOCK_M)
    mask_m = offs_m < num_rows
    token = quotient(offs_m, qheads_per_kvhead)
    row = query_rows(kv_head * qheads_per_kvhead, offs_m, token, num_heads, qheads_per_kvhead)
    q = load_rows(q_ptr, row * HEAD_DIM, mask_m, HEAD_DIM, BLOCK_D)
    norm = row_norms(q.to(tl.float32))
    first = tl.load(first_block_ptr + token, mask=mask_m, other=0).to(tl.int32)
    past = tl.load(block_ptr + token, mask=mask_m, other=0).to(tl.int32)
    low = tl.load(first_block_ptr + first_row // qheads_per_kvhead).to(tl.int32)
    high = tl.max(first + past, axis=0)

    lowest = tl.full([BLOCK_M, BLOCK_N], float("-inf"), tl.float32)
    for start in range(low, high, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        plane = _plane(centred_ptr, offs_n, high, kv_head, num_kv_heads, HEAD_DIM, BLOCK_D)
        s = dot(q, tl.trans(plane)) - _errors(bounds_ptr, norm, offs_n, high, kv_head, num_kv_heads)
        back = offs_n[None, :] - first[:, None]
        lowest = tl.where((back >= 0) & (back < past[:, None]) & (s > lowest), s, lowest)
    theta = tl.full([BLOCK_M], float("-inf"), tl.float32)
    seen = tl.zeros([BLOCK_M], dtype=tl.int32)
    for _ in range(0, num_past):
        best = tl.max(lowest, axis=1)
        theta = tl.where(seen < num_past, best, theta)
        same = lowest == best[:, None]
        seen += tl.sum(same.to(tl.int32), axis=1)
        lowest = tl.where(same, float("-inf"), lowest)
    # Few candidates are all listed, whatever their errors.
    theta = tl.where(past <= KEEP, float("-inf"), theta)

    slot = tl.arange(0, KEEP)[None, :]
    listed = tl.zeros([BLOCK_M, KEEP], dtype=tl.int32)
    count = tl.zeros([BLOCK_M], dtype=tl.int32)
    plane = _plane(centred_ptr, low + tl.arange(0, BLOCK_N), high, kv_head, num_kv_heads, HEAD_DIM, BLOCK_D)
    for start in range(low, high, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        s = dot(q, tl.trans(plane)) + _errors(bounds_ptr, norm, offs_n, high, kv_head, num_kv_heads)
        # A loop with another one inside has no pipeline: the next tile is asked for by hand.
        plane = _plane(centred_ptr, offs_n + BLOCK_N, high, kv_head, num_kv_heads, HEAD_DIM, BLOCK_D)
        back = offs_n[None, :] - first[:, None]
        hit = (back >= 0) & (back < past[:, None]) & (s >= theta[:, None])
        number = tl.where(hit, tl.broadcast_to(offs_n[None, :], (BLOCK_M, BLOCK_N)), NO_BLOCK)
        lowest_number = tl.min(number, axis=1)
        found = (lowest_number < NO_BLOCK) & (count <= KEEP)
        while tl.max(found.to(tl.int32), axis=0) > 0:
            listed = tl.where(found[:, None] & (slot == count[:, None]), lowest_number[:, None], listed)
            count += found.to(tl.int32)
            number = tl.where(number == lowest_number[:, None], NO_BLOCK, number)
            lowest_number = tl.min(number, axis=1)
            found = (lowest_number < NO_BLOCK) & (count <= KEEP)

    unproven = (count > KEEP) | ((past > KEEP) & (norm < LEAST_NORM)) | ~(norm <= LARGEST_NORM)
    flag = tl.sum((mask_m & (past > 0) & unproven).to(tl.int32), axis=0)
    tl.store(flags_ptr + tl.program_id(0) * num_kv_heads + kv_head, flag)

    scores = tl.full([BLOCK_M, KEEP], float("-inf"), tl.float32)
    for place in range(0, tl.where(flag > 0, 0, tl.max(count, axis=0))):
        number = tl.sum(tl.where(slot == place, listed, 0), axis=1)
        is_listed = place < count
        mean_row = (number.to(tl.int64) * num_kv_heads + kv_head) * HEAD_DIM
        s = tl.zeros([BLOCK_M], dtype=tl.float32)
        for part in tl.static_range(0, BLOCK_D, CHUNK_D):
            offs_d = part + tl.arange(0, CHUNK_D)
            mask = is_listed[:, None] & (offs_d < HEAD_DIM)[None, :]
            mean = tl.load(means_ptr + mean_row[:, None] + offs_d[None, :], mask=mask, other=0.0)
            q_part = tl.load(q_ptr + row[:, None] * HEAD_DIM + offs_d[None, :], mask=mask, other=0.0)
            s += tl.sum(q_part.to(tl.float32) * mean, axis=1)
        s = tl.where(is_listed & (s == s), s, float("-inf"))
        scores = tl.where(slot == place, s[:, None], scores)
    for place in range(0, num_past):
        best, number = best_of(scores, listed)
        tl.store(ids_ptr + row * num_past + place, tl.where(best > float("-inf"), number - first, -1), mask=mask_m)
        scores = tl.where((scores == best[:, None]) & (listed == number[:, None]), float("-inf"), scores)


def screen_past(q_TND: Tensor, means_MGD: Tensor, layout: TokenBlocks, ids_TNK: Tensor) -> tuple[Tensor, int]:
    """Choose the past blocks of every query and head as far as the choice can be proven.

    Args:
        q_TND: contiguous queries in bf16 or fp16.
        means_MGD: contiguous fp32 means of the pack's blocks.
        layout: as for `routing.select_past`.
        ids_TNK: int32, filled as `routing.select_past` returns it, but for tiles with a flag.

    Returns:
        flags int32 [tiles, G]: rows of each tile and kv head that have no proven ids; and the rows of a tile, which
        holds the query heads of a kv head token by token.
    """
    num_tokens, num_heads, size = q_TND.shape
    num_kv_heads, num_past = means_MGD.shape[1], ids_TNK.shape[2]
    centred, bounds = centred_plane(means_MGD, q_TND.dtype)
    tiles = config.screen_tiles(q_TND.dtype, size, num_past, config.architecture_of(q_TND))
    qheads_per_kvhead = num_heads // num_kv_heads
    rows, tile_rows = num_tokens * qheads_per_kvhead, tiles["BLOCK_M"]
    flags = torch.empty(triton.cdiv(rows, tile_rows), num_kv_heads, dtype=torch.int32, device=q_TND.device)
    screen[tuple(flags.shape)](
        q_TND, means_MGD, centred, bounds, layout.first_block_T, layout.block_T, ids_TNK, flags,
        rows, num_heads, num_past, qheads_per_kvhead, **tiles,
    )  # fmt: skip
    return flags, tile_rows
