"""Routing: scores and the best blocks in one pass over the summaries; no score ever reaches memory.

A program holds 64 query rows of one kv head and their best blocks so far, and walks the summaries from the most recent
block back to the document's first: recent blocks are often the best, and then few others displace them. The best score
of each row in a tile replaces the worst kept block of that row, again and again while any row gains. "Better" is a
total order, higher score first and then lower number, so the result does not depend on the order of the walk. NaN is
never chosen.

With many blocks in a pack of 16-bit queries (`kernel_sizes.screens`) `screening` chooses first, by a fraction of the
work, and only tiles of rows for which it proves no choice are scored so.

Traffic: each program reads the summaries of its documents, which stay in cache; the choosing costs most, about
K (1 + ln(M / K)) rounds per row.

Legend: T tokens, N query heads, G kv heads, D head size, M blocks, K past blocks per query.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_megatron.ops import kernel_sizes
from moba_megatron.ops.layout import TokenBlocks
from moba_megatron.ops.triton import config
from moba_megatron.ops.triton.common import COUNTS, NO_BLOCK, best_of, dot, load_rows, query_rows, quotient
from moba_megatron.ops.triton.devices import on_its_device
from moba_megatron.ops.triton.screening import screen_past
from moba_megatron.ops.triton.summaries import planes_of

MOST_PAST = 64


@triton.jit
def _worst(s, number):
    worst = tl.min(s, axis=1)
    return worst, tl.max(tl.where(s == worst[:, None], number, -1), axis=1)


@triton.jit
def _gains(best, best_number, worst, worst_number):
    better = (best > worst) | ((best == worst) & (best_number < worst_number))
    return better & (best > float("-inf"))


@triton.jit(do_not_specialize=COUNTS)
def route(
    q_ptr,
    planes_ptr,
    first_block_ptr,
    block_ptr,
    ids_ptr,
    scores_ptr,
    flags_ptr,
    num_rows,
    num_heads,
    num_blocks,
    num_past,
    plane_shrink,
    tile_rows,
    qheads_per_kvhead,
    split_size,
    flag_rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PLANES: tl.constexpr,
    KEEP: tl.constexpr,
    SPLIT: tl.constexpr,
    FLAGGED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (tile of `tile_rows` query rows, at most BLOCK_M, and kv head); see the module.

    With `SPLIT`, one per split of `split_size` blocks of the tile's only document too, which keeps the best of its
    split and writes ids and scores [.., splits, num_past]. With `FLAGGED` a program ends at once where the flag of its
    rows, one for `flag_rows` of them, is 0.
    """
    kv_head, num_kv_heads = tl.program_id(1), tl.num_programs(1)
    first_row = tl.program_id(0) * tile_rows
    if FLAGGED:
        if tl.load(flags_ptr + first_row // flag_rows * num_kv_heads + kv_head) == 0:
            return
    offs_m = first_row + tl.arange(0, BLOCK_M)
    mask_m = (offs_m < num_rows) & (offs_m < first_row + tile_rows)
    token = quotient(offs_m, qheads_per_kvhead)
    row = query_rows(kv_head * qheads_per_kvhead, offs_m, token, num_heads, qheads_per_kvhead)
    q = load_rows(q_ptr, row * HEAD_DIM, mask_m, HEAD_DIM, BLOCK_D)
    first = tl.load(first_block_ptr + token, mask=mask_m, other=0).to(tl.int32)
    own = first + tl.load(block_ptr + token, mask=mask_m, other=0).to(tl.int32)
    low, high = tl.load(first_block_ptr + first_row // qheads_per_kvhead).to(tl.int32), tl.max(own, axis=0)
    least, ids_row = first, row
    if SPLIT:
        low += tl.program_id(2) * split_size
        high = tl.minimum(high, low + split_size)
        least = tl.maximum(first, low)
        ids_row = row * tl.num_programs(2) + tl.program_id(2)

    slot = tl.arange(0, KEEP)[None, :]
    # Surplus slots are never the worst; empty ones are told apart by their numbers.
    kept = tl.zeros([BLOCK_M, KEEP], dtype=tl.float32) + tl.where(slot < num_past, float("-inf"), float("inf"))
    numbers = tl.zeros([BLOCK_M, KEEP], dtype=tl.int32) + (NO_BLOCK - slot)
    plane = num_blocks.to(tl.int64) * num_kv_heads * HEAD_DIM
    for back in range(0, high - low, BLOCK_N):
        offs_n = high - BLOCK_N - back + tl.arange(0, BLOCK_N)
        place = (tl.maximum(offs_n, 0).to(tl.int64) * num_kv_heads + kv_head) * HEAD_DIM
        s = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for rest in tl.static_range(PLANES):
            means = load_rows(planes_ptr + (PLANES - 1 - rest) * plane, place, offs_n >= low, HEAD_DIM, BLOCK_D)
            s = dot(q, tl.trans(means), s * plane_shrink)
        number = tl.broadcast_to(offs_n[None, :], (BLOCK_M, BLOCK_N))
        candidate = (number >= least[:, None]) & (number < own[:, None]) & (s == s)
        s = tl.where(candidate, s, float("-inf"))
        best, best_number = best_of(s, number)
        worst, worst_number = _worst(kept, numbers)
        gains = _gains(best, best_number, worst, worst_number)
        while tl.max(gains.to(tl.int32), axis=0) > 0:
            goes = gains[:, None] & (numbers == worst_number[:, None])
            kept = tl.where(goes, best[:, None], kept)
            numbers = tl.where(goes, best_number[:, None], numbers)
            s = tl.where(number == best_number[:, None], float("-inf"), s)
            best, best_number = best_of(s, number)
            worst, worst_number = _worst(kept, numbers)
            gains = _gains(best, best_number, worst, worst_number)

    kept = tl.where(slot < num_past, kept, float("-inf"))
    for place in range(0, num_past):
        best, best_number = best_of(kept, numbers)
        target = ids_row * num_past + place
        tl.store(ids_ptr + target, tl.where(best > float("-inf"), best_number - first, -1), mask=mask_m)
        if SPLIT:
            tl.store(scores_ptr + target, best, mask=mask_m)
        kept = tl.where(numbers == best_number[:, None], float("-inf"), kept)
        numbers = tl.where(numbers == best_number[:, None], NO_BLOCK, numbers)


@torch.no_grad()
@on_its_device
def select_past(q_TND: Tensor, summaries_MGD: Tensor, layout: TokenBlocks, num_past: int) -> Tensor:
    """Choose the past blocks of every query and head, as `gathered.routing.select_past` does.

    Args:
        q_TND: queries [T, N, D] in bf16, fp16 or fp32.
        summaries_MGD: fp32 means of the pack's blocks, at most 2^31 / D of them per kv head.
        layout: blocks of the queries' tokens, which are all tokens of the pack or some of them in rising order.
        num_past: K, ids per query and head, at most 64.

    Returns:
        int32 [T, N, K], block numbers within the query's document by falling score, equal scores by lower number, -1
        where there are fewer. Scores have fp32's precision whatever q's dtype.

    Raises:
        ValueError: K above 64, or fp64.
    """
    return _select(q_TND, summaries_MGD, layout, num_past)[0]


@torch.no_grad()
@on_its_device
def shares_scored_again(
    q_TND: Tensor, summaries_MGD: Tensor, layout: TokenBlocks, num_past: int
) -> tuple[float, float] | None:
    """What share of the query rows screening proves no choice for, and what share of the tiles is therefore scored
    again; None where nothing is screened. Takes what `select_past` takes, and waits for the result."""
    flags = _select(q_TND, summaries_MGD, layout, num_past)[1]
    if flags is None:
        return None
    return int(flags.sum()) / (q_TND.shape[0] * q_TND.shape[1]), int((flags > 0).sum()) / flags.numel()


def _select(q_TND: Tensor, summaries_MGD: Tensor, layout: TokenBlocks, num_past: int) -> tuple[Tensor, Tensor | None]:
    """Ids, and the flags of screening if blocks are screened."""
    if num_past > MOST_PAST:
        raise ValueError(
            f"the triton backend keeps at most {MOST_PAST} past blocks per query, not {num_past}: lower top_k to "
            f"{MOST_PAST + 1}, or use backend='gathered'"
        )
    q = config.checked(q_TND).contiguous()
    num_tokens, num_heads, size = q.shape
    num_blocks, num_kv_heads, _ = summaries_MGD.shape
    ids = torch.empty(num_tokens, num_heads, num_past, dtype=torch.int32, device=q.device)
    if ids.numel() == 0:
        return ids, None
    means = summaries_MGD.float().contiguous()
    flags, flag_rows = None, 0
    if kernel_sizes.screens(num_blocks, num_past, q.element_size()):
        flags, flag_rows = screen_past(q, means, layout, ids)
    planes, step = planes_of(means, q.dtype)
    tiles = config.route_tiles(q.dtype, size, num_past, architecture=config.architecture_of(q))
    # A tile lies within one that has a flag.
    tile_rows = min(tiles["BLOCK_M"], flag_rows or tiles["BLOCK_M"])
    qheads_per_kvhead = num_heads // num_kv_heads
    rows = num_tokens * qheads_per_kvhead
    route[(triton.cdiv(rows, tile_rows), num_kv_heads)](
        q, planes, layout.first_block_T, layout.block_T, ids, means, ids if flags is None else flags,
        rows, num_heads, num_blocks, num_past, 1 / step, tile_rows, qheads_per_kvhead, num_blocks, flag_rows,
        SPLIT=False, FLAGGED=flags is not None, **tiles,
    )  # fmt: skip
    return ids, flags
