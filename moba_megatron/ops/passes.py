"""The two kinds of work in portable PyTorch: triangles (stretches of tokens that attend themselves) and units (keys
that gathered query rows attend entirely), for one key head and some of its query heads at a time (a *pass*).

Keys and values of the pass's one key head lie dense; tiles are cut so that their scores stay in a core's cache.

Legend: T query tokens, N query heads, S key rows, D head size, t tokens of a range, E entries of a list. A query *row*
is token * N + head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moba_megatron.ops import tiles
from moba_megatron.ops.entries import Entries, heads_at_once, most_entries, sort_entries, token_ranges
from moba_megatron.ops.fragments import Fragment, Keys
from moba_megatron.ops.precision import score_dtype

ROWS_OF_TRIANGLE = 128
# Scores of one tile per thread: 1 MiB in fp32, half of a current core's second cache. An accelerator wants larger
# tiles.
SCORES_PER_THREAD = 2**18
SCORES_ON_ACCELERATOR = 2**26


@dataclass(frozen=True)
class Pass:
    """One key head with some of its query heads: queries of all heads [T, N, D], keys and values of one head [S, D]."""

    heads: slice
    group: int
    most_entries: int
    q: Tensor
    k: Tensor
    v: Tensor
    ids: Tensor
    fragment: Fragment
    scale: float
    dtype: torch.dtype
    triangle: Tensor

    @property
    def split(self) -> int:
        """Parts into which a tile's rows are cut to run side by side: one per CPU thread."""
        return min(torch.get_num_threads(), 8) if self.q.device.type == "cpu" else 1

    @property
    def scores_budget(self) -> int:
        return SCORES_PER_THREAD * self.split if self.q.device.type == "cpu" else SCORES_ON_ACCELERATOR

    def entries(self) -> Iterator[Entries]:
        """The work lists of units, one range of tokens after the other."""
        num_tokens, per_query = self.ids.shape[0], self.fragment.per_query(self.ids.shape[2])
        if per_query and num_tokens:
            num_heads = self.heads.stop - self.heads.start
            for tokens in token_ranges(num_tokens, num_heads, per_query, self.most_entries):
                yield sort_entries(self.ids, tokens, self.heads, self.fragment)


def passes(
    q: Tensor, keys: Keys, ids: Tensor, fragment: Fragment, scale: float, workspace_bytes: int | None
) -> Iterator[Pass]:
    """All passes of one attention call, key head by key head."""
    size = keys.group_size
    most = most_entries(q, size, workspace_bytes)
    step = heads_at_once(q.shape[0], size, fragment.per_query(ids.shape[2]), most)
    dtype = score_dtype(q.dtype)
    side = min(ROWS_OF_TRIANGLE, max((length for _, _, length in fragment.triangles), default=0))
    triangle = torch.ones(side, side, dtype=torch.bool, device=q.device).triu_(1)
    for group in range(keys.k.shape[1]):
        k_SD, v_SD = keys.k[:, group].contiguous(), keys.v[:, group].contiguous()
        head = (keys.first + group) * size
        for first in range(head, head + size, step):
            heads = slice(first, min(first + step, head + size))
            yield Pass(heads, group, most, q, k_SD, v_SD, ids, fragment, scale, dtype, triangle)


def _triangle_tiles(work: Pass) -> Iterator[tuple[int, slice, tuple[int, int]]]:
    """Tiles of a few adjacent triangles at a time: (head, tokens, (triangles, tokens of each))."""
    for start, stretches, length in work.fragment.triangles:
        step = max(1, work.scores_budget // (min(length, ROWS_OF_TRIANGLE) * length))
        for head in range(work.heads.start, work.heads.stop):
            for first in range(0, stretches, step):
                count = min(step, stretches - first)
                begin = start + first * length
                yield head, slice(begin, begin + count * length), (count, length)


def triangles_forward(work: Pass, out_TND: Tensor, lse_TN: Tensor) -> None:
    """Write out and lse of all rows under triangles."""
    for head, span, shape in _triangle_tiles(work):
        q, k, v = (x.unflatten(0, shape) for x in (work.q[span, head], work.k[span], work.v[span]))
        out, lse = out_TND[span, head].unflatten(0, shape), lse_TN[span, head].unflatten(0, shape)
        if tiles.uses_fused_kernel(q):
            part, part_lse = tiles.fused_forward(q.contiguous(), k, v, work.scale, is_causal=True)
            out.copy_(part)
            lse.copy_(part_lse)
            continue
        k, v = k.to(work.dtype), v.to(work.dtype)
        for top in range(0, shape[1], ROWS_OF_TRIANGLE):
            end = min(top + ROWS_OF_TRIANGLE, shape[1])
            mask = work.triangle[: end - top, : end - top]
            rows = q[:, top:end].to(work.dtype)
            out[:, top:end], lse[:, top:end] = tiles.matmul_forward(rows, k[:, :end], v[:, :end], work.scale, mask)


def triangles_backward(
    work: Pass, dout_TND: Tensor, lse_TN: Tensor, delta_TN: Tensor, dq_TND: Tensor, dk_SD: Tensor, dv_SD: Tensor
) -> None:
    """Add the triangles' shares to dq [T, N, D], dk and dv [S, D]."""
    for head, span, shape in _triangle_tiles(work):
        sources = (work.q[span, head], dout_TND[span, head], work.k[span], work.v[span])
        q, dout, k, v = (x.unflatten(0, shape).to(work.dtype) for x in sources)
        lse, delta = (x[span, head].unflatten(0, shape) for x in (lse_TN, delta_TN))
        dq, dk, dv = (x[span].unflatten(0, shape) for x in (dq_TND[:, head], dk_SD, dv_SD))
        for top in range(0, shape[1], ROWS_OF_TRIANGLE):
            end = min(top + ROWS_OF_TRIANGLE, shape[1])
            mask, rows = work.triangle[: end - top, : end - top], slice(top, end)
            dq_part, dk_part, dv_part = tiles.matmul_backward(
                dout[:, rows], q[:, rows], k[:, :end], v[:, :end], lse[:, rows], delta[:, rows], work.scale, mask
            )
            dq[:, rows] += dq_part
            dk[:, :end] += dk_part
            dv[:, :end] += dv_part


def _unit_tiles(work: Pass, entries: Entries, fused: bool) -> Iterator[tuple[slice, int, int]]:
    """Tiles of units: (key rows, first entry, one past the last entry)."""
    # The fused kernel keeps no scores and is at its best with longer tiles.
    budget = work.scores_budget * (2 if fused else 1)
    for start, end, first, last in entries.units:
        rows = max(64, budget // (end - start))
        for low in range(first, last, rows):
            yield slice(start, end), low, min(low + rows, last)


def _gather(source: Tensor, rows: Tensor, split: int) -> Tensor:
    """Query rows [n, ...] of [T, N, ...] as a tile [split, ceil(n / split), ...], filled up with zeros."""
    each = -(-rows.numel() // split)
    tile = source.new_empty(each * split, *source.shape[2:])
    torch.index_select(source.flatten(0, 1), 0, rows, out=tile[: rows.numel()])
    tile[rows.numel() :] = 0
    return tile.view(split, each, *source.shape[2:])


def units_forward(work: Pass, entries: Entries, part_ED: Tensor, part_lse_E: Tensor) -> None:
    """Write output and log-sum-exp of every entry, in sorted order; 0 and -inf for pairs without a unit."""
    part_ED[entries.count :] = 0
    part_lse_E[entries.count :] = -torch.inf
    fused = tiles.uses_fused_kernel(work.q)
    split = 1 if fused else work.split
    for span, low, high in _unit_tiles(work, entries, fused):
        q = _gather(work.q, entries.row_E[low:high], split)
        if fused:
            out, lse = tiles.fused_forward(q, work.k[None, span], work.v[None, span], work.scale)
        else:
            k, v = (x[span].to(work.dtype).expand(split, -1, -1) for x in (work.k, work.v))
            out, lse = tiles.matmul_forward(q.to(work.dtype), k, v, work.scale)
        part_ED[low:high] = out.flatten(0, 1)[: high - low]
        part_lse_E[low:high] = lse.flatten()[: high - low]


def units_backward(
    work: Pass,
    entries: Entries,
    dout_TND: Tensor,
    out_TND: Tensor | None,
    lse_TN: Tensor,
    delta_TN: Tensor,
    part_ED: Tensor,
    dk_SD: Tensor,
    dv_SD: Tensor,
) -> None:
    """Write dq of every entry, in sorted order, and add the units' shares to dk and dv [S, D]."""
    part_ED[entries.count :] = 0
    # The fused kernel makes delta from the output; without the output at hand, products do.
    fused = tiles.uses_fused_kernel(work.q) and out_TND is not None
    for span, low, high in _unit_tiles(work, entries, fused):
        rows = entries.row_E[low:high]
        q, dout, lse = (_gather(x, rows, work.split) for x in (work.q, dout_TND, lse_TN))
        k, v = (x[span].expand(work.split, -1, -1) for x in (work.k, work.v))
        if fused:
            out = _gather(out_TND, rows, work.split)
            dq, dk, dv = tiles.fused_backward(dout, q, k, v, out, lse, work.scale)
        else:
            delta = _gather(delta_TN, rows, work.split)
            inputs = (x.to(work.dtype) for x in (dout, q, k, v))
            dq, dk, dv = tiles.matmul_backward(*inputs, lse, delta, work.scale)
        part_ED[low:high] = dq.flatten(0, 1)[: high - low]
        for total, parts in ((dk_SD[span], dk), (dv_SD[span], dv)):
            for part in parts:
                total += part
