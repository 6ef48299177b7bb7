"""Routing: scores and the best blocks in one pass over the summaries; no score ever reaches memory.

A program holds 64 query rows of one key head and their best blocks so far, and walks the summaries from the most
recent block back to the document's first: recent blocks are often the best, and then few later ones displace anything.
Of a tile of scores the best of each row is taken out and put in the place of the row's worst kept block, as long as any
row gains by it. "Better" is a total order, higher score first and then lower number, so that the result does not depend
on the order of the walk. NaN is never chosen.

Traffic: each program reads the summaries of its documents, which live in cache; the cost is the choosing, about
K (1 + ln(M / K)) rounds per row.

Legend: T tokens, N query heads, G key heads, D head size, M blocks, K past blocks per query.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_megatron.ops.layout import TokenBlocks
from moba_megatron.ops.triton import config
from moba_megatron.ops.triton.common import COUNTS, dot, load_rows, quotient, row_offsets
from moba_megatron.ops.triton.devices import on_its_device
from moba_megatron.ops.triton.summaries import planes_of

MOST_PAST = 64
NO_BLOCK = tl.constexpr(2**31 - 1)


@triton.jit
def _best(score, number):
    """Of each row the highest score, and the lowest number that has it."""
    best = tl.max(score, axis=1)
    return best, tl.min(tl.where(score == best[:, None], number, NO_BLOCK), axis=1)


@triton.jit
def _worst(score, number):
    worst = tl.min(score, axis=1)
    return worst, tl.max(tl.where(score == worst[:, None], number, -1), axis=1)


@triton.jit
def _gains(best, best_number, worst, worst_number):
    better = (best > worst) | ((best == worst) & (best_number < worst_number))
    return better & (best > float("-inf"))


@triton.jit(do_not_specialize=COUNTS)
def select_blocks(
    q,
    planes,
    first_block,
    block,
    ids,
    scores,
    num_rows,
    num_heads,
    num_blocks,
    num_past,
    plane_shrink,
    tile_rows,
    group_size,
    part_blocks,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PLANES: tl.constexpr,
    KEEP: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (tile of `tile_rows` query rows, at most BLOCK_M, and key head); see the module.

    With `SPLIT`, one per part of `part_blocks` blocks of the tile's only document too, which keeps the best of its part
    and writes ids and scores [.., parts, num_past].
    """
    group, groups = tl.program_id(1), tl.num_programs(1)
    top_row = tl.program_id(0) * tile_rows
    row = top_row + tl.arange(0, BLOCK_M)
    inside = (row < num_rows) & (row < top_row + tile_rows)
    token = quotient(row, group_size)
    at = row_offsets(group * group_size, row, token, num_heads, group_size)
    queries = load_rows(q, at * HEAD_SIZE, inside, HEAD_SIZE, WIDTH)
    first = tl.load(first_block + token, mask=inside, other=0).to(tl.int32)
    own = first + tl.load(block + token, mask=inside, other=0).to(tl.int32)
    low, high = tl.load(first_block + top_row // group_size).to(tl.int32), tl.max(own, axis=0)
    least, list_at = first, at
    if SPLIT:
        low += tl.program_id(2) * part_blocks
        high = tl.minimum(high, low + part_blocks)
        least = tl.maximum(first, low)
        list_at = at * tl.num_programs(2) + tl.program_id(2)

    slot = tl.arange(0, KEEP)[None, :]
    # Surplus slots are never the worst; empty ones are told apart by their numbers.
    kept = tl.zeros([BLOCK_M, KEEP], dtype=tl.float32) + tl.where(slot < num_past, float("-inf"), float("inf"))
    numbers = tl.zeros([BLOCK_M, KEEP], dtype=tl.int32) + (NO_BLOCK - slot)
    plane = num_blocks.to(tl.int64) * groups * HEAD_SIZE
    for back in range(0, high - low, BLOCK_N):
        column = high - BLOCK_N - back + tl.arange(0, BLOCK_N)
        place = (tl.maximum(column, 0).to(tl.int64) * groups + group) * HEAD_SIZE
        score = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for rest in tl.static_range(PLANES):
            keys = load_rows(planes + (PLANES - 1 - rest) * plane, place, column >= low, HEAD_SIZE, WIDTH)
            score = dot(queries, tl.trans(keys), score * plane_shrink)
        number = tl.broadcast_to(column[None, :], (BLOCK_M, BLOCK_N))
        candidate = (number >= least[:, None]) & (number < own[:, None]) & (score == score)
        score = tl.where(candidate, score, float("-inf"))
        best, best_number = _best(score, number)
        worst, worst_number = _worst(kept, numbers)
        gains = _gains(best, best_number, worst, worst_number)
        while tl.max(gains.to(tl.int32), axis=0) > 0:
            goes = gains[:, None] & (numbers == worst_number[:, None])
            kept = tl.where(goes, best[:, None], kept)
            numbers = tl.where(goes, best_number[:, None], numbers)
            score = tl.where(number == best_number[:, None], float("-inf"), score)
            best, best_number = _best(score, number)
            worst, worst_number = _worst(kept, numbers)
            gains = _gains(best, best_number, worst, worst_number)

    kept = tl.where(slot < num_past, kept, float("-inf"))
    for place in range(0, num_past):
        best, best_number = _best(kept, numbers)
        target = list_at * num_past + place
        tl.store(ids + target, tl.where(best > float("-inf"), best_number - first, -1), mask=inside)
        if SPLIT:
            tl.store(scores + target, best, mask=inside)
        kept = tl.where(numbers == best_number[:, None], float("-inf"), kept)
        numbers = tl.where(numbers == best_number[:, None], NO_BLOCK, numbers)


@torch.no_grad()
@on_its_device
def select_past(q_TND: Tensor, summaries_MGD: Tensor, layout: TokenBlocks, num_past: int) -> Tensor:
    """Choose the past blocks of every query and head, as `ops.gathered.routing.select_past` does.

    Args:
        q_TND: queries [T, N, D] in bf16, fp16 or fp32.
        summaries_MGD: fp32 means of the pack's blocks, at most 2^31 / D of them per key head.
        layout: blocks of the queries' tokens, which are all tokens of the pack or some of them in rising order.
        num_past: K, ids per query and head, at most 64.

    Returns:
        int32 [T, N, K], block numbers within the query's document by falling score, equal scores by lower number, -1
        where there are fewer. Scores have fp32's precision whatever q's dtype.

    Raises:
        ValueError: K above 64, or fp64.
    """
    if num_past > MOST_PAST:
        raise ValueError(
            f"the triton backend keeps at most {MOST_PAST} past blocks per query, not {num_past}: lower top_k to "
            f"{MOST_PAST + 1}, or use backend='gathered'"
        )
    q = config.checked(q_TND).contiguous()
    num_tokens, num_heads, size = q.shape
    num_blocks, groups, _ = summaries_MGD.shape
    ids = torch.empty(num_tokens, num_heads, num_past, dtype=torch.int32, device=q.device)
    if ids.numel() == 0:
        return ids
    means = summaries_MGD.float()
    planes, step = planes_of(means, q.dtype)
    tiles = config.route_tiles(q.dtype, size, num_past, architecture=config.architecture_of(q))
    rows = num_tokens * (num_heads // groups)
    select_blocks[(triton.cdiv(rows, tiles["BLOCK_M"]), groups)](
        q, planes.contiguous(), layout.first_block_T, layout.block_T, ids, means,
        rows, num_heads, num_blocks, num_past, 1 / step, tiles["BLOCK_M"], num_heads // groups, num_blocks,
        SPLIT=False, **tiles,
    )  # fmt: skip
    return ids
