"""Attention with given block ids in portable PyTorch, sparse in time and memory, on any device.

Queries come to the keys. All work is done for one key head and some of its query heads at a time (a *pass*), and past
blocks for a range of tokens at a time, so that keys and values are never repeated and buffers stay small:

1. Own blocks: every full block of a document in batched tiles, causal inside; short last blocks singly. Rows are taken
   `ROWS_OF_TRIANGLE` at a time, each against the keys up to its last row, so that little above the diagonal is
   computed.
2. Past blocks: an *entry* is one (query row, chosen block). Sorted by block (`entries`), they list the rows of each
   block; these are gathered, attend the whole block, and their outputs and log-sum-exps lie in sorted order.
3. Merge: each row picks its entries by the inverse permutation and adds own and past outputs by log-sum-exp in fp32.

Saved for backward: q, k, v, ids, out and lse. The backward pass makes the entries again, recomputes the probabilities
from the global lse, writes dq of entries in sorted order and adds them per row in slot order, and adds dk and dv per
block in row order: nothing here adds in an order left open, so that on a CPU two runs with the same number of threads
give the same bits. dq, dk and dv are summed in fp32 or wider; the share of dq that each past block gives is first
rounded to the inputs' dtype, as its share of the output is.

Limitation: the work list is read on the host, so on an accelerator each call waits for the ids. The backend is portable
first.

Legend: T tokens, N query heads, G key heads, D head size, K past blocks per query (top_k - 1), t tokens of a range, H
query heads of a pass, E = t H K entries. A query *row* is token * N + head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moba_megatron.ops import tiles
from moba_megatron.ops.entries import Entries, heads_at_once, sort_entries, token_ranges
from moba_megatron.ops.layout import BlockLayout
from moba_megatron.ops.merge import merge_weights
from moba_megatron.ops.precision import score_dtype, without_autocast

ROWS_OF_TRIANGLE = 128
TOKENS_OF_MERGE = 4096
# Scores of one tile per thread: 1 MiB in fp32, half of a current core's second cache. An accelerator wants larger
# tiles.
SCORES_PER_THREAD = 2**18
SCORES_ON_ACCELERATOR = 2**26


@dataclass(frozen=True)
class _Pass:
    """One key head with some of its query heads: queries of all heads [T, N, D], keys and values of one head [T, D]."""

    heads: slice
    group: int
    q: Tensor
    k: Tensor
    v: Tensor
    ids: Tensor
    layout: BlockLayout
    scale: float
    dtype: torch.dtype
    triangle: Tensor

    @property
    def fused(self) -> bool:
        return tiles.uses_fused_kernel(self.q)

    @property
    def split(self) -> int:
        """Parts into which a tile's rows are cut to run side by side: one per CPU thread."""
        return min(torch.get_num_threads(), 8) if self.q.device.type == "cpu" else 1

    @property
    def scores_budget(self) -> int:
        return SCORES_PER_THREAD * self.split if self.q.device.type == "cpu" else SCORES_ON_ACCELERATOR

    def past(self) -> Iterator[Entries]:
        """The work lists of past blocks, one range of tokens after the other."""
        num_tokens, num_heads, num_past = self.ids.shape
        if num_past:
            for tokens in token_ranges(num_tokens, num_heads, self.heads, num_past):
                yield sort_entries(self.ids, tokens, self.heads, self.layout)


def _passes(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, layout: BlockLayout, scale: float) -> Iterator[_Pass]:
    num_heads, num_groups, num_past = q.shape[1], k.shape[1], ids.shape[2]
    group_size = num_heads // num_groups
    step = heads_at_once(num_heads, group_size, num_past)
    dtype = score_dtype(q.dtype)
    side = min(ROWS_OF_TRIANGLE, layout.block_size)
    triangle = torch.ones(side, side, dtype=torch.bool, device=q.device).triu_(1)
    for group in range(num_groups):
        k_TD, v_TD = k[:, group].contiguous(), v[:, group].contiguous()
        for first in range(group * group_size, (group + 1) * group_size, step):
            heads = slice(first, min(first + step, (group + 1) * group_size))
            yield _Pass(heads, group, q, k_TD, v_TD, ids, layout, scale, dtype, triangle)


def _own_tiles(work: _Pass) -> Iterator[tuple[int, slice, tuple[int, int]]]:
    """Tiles of own blocks, a few adjacent blocks at a time: (head, tokens, (blocks, tokens per block))."""
    for start, num_blocks, length in work.layout.runs():
        step = max(1, work.scores_budget // (min(length, ROWS_OF_TRIANGLE) * length))
        for head in range(work.heads.start, work.heads.stop):
            for first in range(0, num_blocks, step):
                count = min(step, num_blocks - first)
                begin = start + first * length
                yield head, slice(begin, begin + count * length), (count, length)


def _own_forward(work: _Pass, out_TND: Tensor, lse_TN: Tensor) -> None:
    for head, span, shape in _own_tiles(work):
        q, k, v = (x.unflatten(0, shape) for x in (work.q[span, head], work.k[span], work.v[span]))
        out, lse = out_TND[span, head].unflatten(0, shape), lse_TN[span, head].unflatten(0, shape)
        if work.fused:
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


def _own_backward(
    work: _Pass, dout_TND: Tensor, lse_TN: Tensor, delta_TN: Tensor, dq_TND: Tensor, dk_TD: Tensor, dv_TD: Tensor
) -> None:
    for head, span, shape in _own_tiles(work):
        sources = (work.q[span, head], dout_TND[span, head], work.k[span], work.v[span])
        q, dout, k, v = (x.unflatten(0, shape).to(work.dtype) for x in sources)
        lse, delta = (x[span, head].unflatten(0, shape) for x in (lse_TN, delta_TN))
        dq, dk, dv = (x[span].unflatten(0, shape) for x in (dq_TND[:, head], dk_TD, dv_TD))
        for top in range(0, shape[1], ROWS_OF_TRIANGLE):
            end = min(top + ROWS_OF_TRIANGLE, shape[1])
            mask, rows = work.triangle[: end - top, : end - top], slice(top, end)
            dq[:, rows], dk_part, dv_part = tiles.matmul_backward(
                dout[:, rows], q[:, rows], k[:, :end], v[:, :end], lse[:, rows], delta[:, rows], work.scale, mask
            )
            dk[:, :end] += dk_part
            dv[:, :end] += dv_part


def _past_tiles(work: _Pass, entries: Entries) -> Iterator[tuple[slice, int, int]]:
    """Tiles of past blocks: (key tokens, first entry, one past the last entry)."""
    # The fused kernel keeps no scores and is at its best with longer tiles.
    budget = work.scores_budget * (2 if work.fused else 1)
    rows = max(64, budget // work.layout.block_size)
    for start, first, last in entries.blocks:
        for low in range(first, last, rows):
            yield slice(start, start + work.layout.block_size), low, min(low + rows, last)


def _gather(source: Tensor, rows: Tensor, split: int) -> Tensor:
    """Query rows [n, ...] of [T, N, ...] as a tile [split, ceil(n / split), ...], filled up with zeros."""
    each = -(-rows.numel() // split)
    tile = source.new_empty(each * split, *source.shape[2:])
    torch.index_select(source.flatten(0, 1), 0, rows, out=tile[: rows.numel()])
    tile[rows.numel() :] = 0
    return tile.view(split, each, *source.shape[2:])


def _past_forward(work: _Pass, entries: Entries, part_ED: Tensor, part_lse_E: Tensor) -> None:
    part_ED[entries.count :] = 0
    part_lse_E[entries.count :] = -torch.inf
    split = 1 if work.fused else work.split
    for span, low, high in _past_tiles(work, entries):
        q = _gather(work.q, entries.row_E[low:high], split)
        if work.fused:
            out, lse = tiles.fused_forward(q, work.k[None, span], work.v[None, span], work.scale)
        else:
            k, v = (x[span].to(work.dtype).expand(split, -1, -1) for x in (work.k, work.v))
            out, lse = tiles.matmul_forward(q.to(work.dtype), k, v, work.scale)
        part_ED[low:high] = out.flatten(0, 1)[: high - low]
        part_lse_E[low:high] = lse.flatten()[: high - low]


def _past_backward(
    work: _Pass,
    entries: Entries,
    dout_TND: Tensor,
    out_TND: Tensor,
    lse_TN: Tensor,
    delta_TN: Tensor,
    part_ED: Tensor,
    dk_TD: Tensor,
    dv_TD: Tensor,
) -> None:
    part_ED[entries.count :] = 0
    for span, low, high in _past_tiles(work, entries):
        rows = entries.row_E[low:high]
        q, dout, lse = (_gather(x, rows, work.split) for x in (work.q, dout_TND, lse_TN))
        k, v = (x[span].expand(work.split, -1, -1) for x in (work.k, work.v))
        if work.fused:
            out = _gather(out_TND, rows, work.split)
            dq, dk, dv = tiles.fused_backward(dout, q, k, v, out, lse, work.scale)
        else:
            delta = _gather(delta_TN, rows, work.split)
            inputs = (x.to(work.dtype) for x in (dout, q, k, v))
            dq, dk, dv = tiles.matmul_backward(*inputs, lse, delta, work.scale)
        part_ED[low:high] = dq.flatten(0, 1)[: high - low]
        for total, parts in ((dk_TD[span], dk), (dv_TD[span], dv)):
            for part in parts:
                total += part


def _merge_forward(entries: Entries, part_ED: Tensor, part_lse_E: Tensor, out_TND: Tensor, lse_TN: Tensor) -> None:
    """Merge the entries' outputs into the own blocks' out and lse, in place, a few tokens at a time."""
    out_tHD, lse_tH = (x[entries.tokens, entries.heads] for x in (out_TND, lse_TN))
    for first in range(0, out_tHD.shape[0], TOKENS_OF_MERGE):
        tokens = slice(first, first + TOKENS_OF_MERGE)
        place_KtH = entries.place_tHK[tokens].permute(2, 0, 1)
        weights, lse_tH[tokens] = merge_weights(torch.cat([lse_tH[None, tokens], part_lse_E[place_KtH]]))
        total = out_tHD[tokens] * weights[0].unsqueeze(-1)
        for place, weight in zip(place_KtH, weights[1:], strict=True):
            part = part_ED.index_select(0, place.flatten()).view(total.shape)
            total.addcmul_(part.to(total.dtype), weight.unsqueeze(-1))
        out_tHD[tokens] = total


def _merge_backward(entries: Entries, part_ED: Tensor, dq_TND: Tensor) -> None:
    """Add the entries' gradients to those of the own blocks, in place and in slot order."""
    dq_tHD = dq_TND[entries.tokens, entries.heads]
    for first in range(0, dq_tHD.shape[0], TOKENS_OF_MERGE):
        tokens = slice(first, first + TOKENS_OF_MERGE)
        for place in entries.place_tHK[tokens].unbind(-1):
            dq_tHD[tokens] += part_ED.index_select(0, place.flatten()).view(dq_tHD[tokens].shape)


def _delta(dout_TND: Tensor, out_TND: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, N]: inner products of the output and its gradient, a few tokens at a time to spare wide copies."""
    chunks = zip(dout_TND.split(TOKENS_OF_MERGE), out_TND.split(TOKENS_OF_MERGE), strict=True)
    return torch.cat([(dout.to(dtype) * out).sum(dim=-1) for dout, out in chunks])


def _entry_buffer(buffer: Tensor | None, entries: Entries, q_TND: Tensor) -> Tensor:
    """A buffer [at least E, D] in q's dtype, made for the first work list of a call, which is the longest."""
    return q_TND.new_empty(entries.row_E.numel(), q_TND.shape[2]) if buffer is None else buffer


@without_autocast
def attend_forward(
    q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, ids_TNK: Tensor, layout: BlockLayout, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over each query's own block (causal) and the past blocks given by ids; no gradient.

    Args:
        q_TND, k_TGD, v_TGD: queries [T, N, D], keys and values [T, G, D], one floating dtype and device.
        ids_TNK: int32 [T, N, K], block numbers within the document, each a complete past block, none twice; -1 for
            none.
        layout: blocks of the pack.
        softmax_scale: factor on the scores.

    Returns:
        out [T, N, D] in q's dtype, lse [T, N] in fp32 (fp64 for fp64 inputs).
    """
    q_TND = q_TND.contiguous()
    out_TND = torch.empty_like(q_TND)
    lse_TN = torch.empty(q_TND.shape[:2], dtype=score_dtype(q_TND.dtype), device=q_TND.device)
    buffer_ED = None
    for work in _passes(q_TND, k_TGD, v_TGD, ids_TNK, layout, softmax_scale):
        _own_forward(work, out_TND, lse_TN)
        for entries in work.past():
            buffer_ED = _entry_buffer(buffer_ED, entries, q_TND)
            part_ED = buffer_ED[: entries.row_E.numel()]
            part_lse_E = torch.empty(part_ED.shape[0], dtype=work.dtype, device=q_TND.device)
            _past_forward(work, entries, part_ED, part_lse_E)
            _merge_forward(entries, part_ED, part_lse_E, out_TND, lse_TN)
    return out_TND, lse_TN


@without_autocast
def attend_backward(
    dout_TND: Tensor,
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    out_TND: Tensor,
    lse_TN: Tensor,
    ids_TNK: Tensor,
    layout: BlockLayout,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend_forward` with respect to q, k and v, in their dtype.

    `out_TND` and `lse_TN` are those of the *whole* attention. Where these keys and ids are only a part of it (other
    keys lie on other ranks), the results are this part's share, and shares add up.
    """
    q_TND, dout_TND, out_TND, lse_TN = (x.contiguous() for x in (q_TND, dout_TND, out_TND, lse_TN))
    dtype = score_dtype(q_TND.dtype)
    dq_TND = torch.empty_like(q_TND, dtype=dtype)
    dk_TGD, dv_TGD = torch.empty_like(k_TGD), torch.empty_like(v_TGD)
    delta_TN = _delta(dout_TND, out_TND, dtype)
    buffer_ED, last_group = None, -1
    for work in _passes(q_TND, k_TGD, v_TGD, ids_TNK, layout, softmax_scale):
        if work.group != last_group:
            dk_TD, dv_TD = (torch.zeros_like(work.k, dtype=dtype) for _ in range(2))
            last_group = work.group
        _own_backward(work, dout_TND, lse_TN, delta_TN, dq_TND, dk_TD, dv_TD)
        for entries in work.past():
            buffer_ED = _entry_buffer(buffer_ED, entries, q_TND)
            part_ED = buffer_ED[: entries.row_E.numel()]
            _past_backward(work, entries, dout_TND, out_TND, lse_TN, delta_TN, part_ED, dk_TD, dv_TD)
            _merge_backward(entries, part_ED, dq_TND)
        dk_TGD[:, work.group], dv_TGD[:, work.group] = dk_TD, dv_TD
    return dq_TND.to(q_TND.dtype), dk_TGD, dv_TGD


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, ids, layout, softmax_scale):
        out, lse = attend_forward(q, k, v, ids, layout, softmax_scale)
        ctx.save_for_backward(q, k, v, out, lse, ids)
        ctx.layout, ctx.softmax_scale = layout, softmax_scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        q, k, v, out, lse, ids = ctx.saved_tensors
        gradients = attend_backward(dout, q, k, v, out, lse, ids, ctx.layout, ctx.softmax_scale)
        return *gradients, None, None, None


def attend(
    q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, ids_TNK: Tensor, layout: BlockLayout, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """`attend_forward` with gradients to q, k and v; the returned lse carries none."""
    return _Attend.apply(q_TND, k_TGD, v_TGD, ids_TNK, layout, softmax_scale)
