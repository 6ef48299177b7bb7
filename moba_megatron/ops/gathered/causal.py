"""Causal spans, forward and backward: tokens that attend themselves (own blocks, in a whole pack), in batched tiles.

Rows are taken `CAUSAL_ROWS` at a time, each against the keys up to its last row, so that little above the diagonal is
computed.

Legend: T query tokens, N query heads, S key rows, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from moba_megatron.ops.gathered import tiles
from moba_megatron.ops.gathered.kv_heads import CAUSAL_ROWS, KVHeads


def _causal_tiles(kv: KVHeads) -> Iterator[tuple[int, slice, tuple[int, int]]]:
    """Tiles of a few adjacent causal spans at a time: (head, tokens, (spans, tokens of each))."""
    for start, spans, length in kv.fragment.causal_spans:
        step = max(1, kv.scores_budget // (min(length, CAUSAL_ROWS) * length))
        for head in range(kv.heads.start, kv.heads.stop):
            for first in range(0, spans, step):
                count = min(step, spans - first)
                begin = start + first * length
                yield head, slice(begin, begin + count * length), (count, length)


def causal_forward(kv: KVHeads, out_TND: Tensor, lse_TN: Tensor) -> None:
    """Write out and lse of all rows in causal spans."""
    fused = tiles.uses_fused_kernel(kv.q)
    for head, tokens, shape in _causal_tiles(kv):
        out, lse = out_TND[tokens, head].unflatten(0, shape), lse_TN[tokens, head].unflatten(0, shape)
        kv_head = kv.kv_head_of(head)
        if fused:
            sources = (kv.q[tokens, head].contiguous(), kv.k[kv_head, tokens], kv.v[kv_head, tokens])
            q, k, v = (x.unflatten(0, shape) for x in sources)
            tile_out, tile_lse = tiles.fused_forward(q, k, v, kv.scale, is_causal=True)
            out.copy_(tile_out)
            lse.copy_(tile_lse)
            continue
        sources = (kv.q[tokens, head].to(kv.dtype) * kv.scale, kv.k_wide[kv_head, tokens], kv.v_wide[kv_head, tokens])
        q, k, v = (x.unflatten(0, shape) for x in sources)
        for first in range(0, shape[1], CAUSAL_ROWS):
            end = min(first + CAUSAL_ROWS, shape[1])
            mask, rows = kv.causal_mask[: end - first, : end - first], slice(first, end)
            out[:, rows], lse[:, rows] = tiles.matmul_forward(q[:, rows], k[:, :end], v[:, :end], mask)


def causal_backward(
    kv: KVHeads, do_TND: Tensor, lse_TN: Tensor, delta_TN: Tensor, dq_TND: Tensor, dk_gSD: Tensor, dv_gSD: Tensor
) -> None:
    """Add what the causal spans give to dq [T, N, D], dk and dv [g, S, D]."""
    for head, tokens, shape in _causal_tiles(kv):
        kv_head = kv.kv_head_of(head)
        sources = (kv.q[tokens, head].to(kv.dtype) * kv.scale, do_TND[tokens, head].to(kv.dtype))
        q, do = (x.unflatten(0, shape) for x in sources)
        k, v, dk, dv = (x[kv_head, tokens].unflatten(0, shape) for x in (kv.k_wide, kv.v_wide, dk_gSD, dv_gSD))
        lse, delta, dq = (x[tokens, head].unflatten(0, shape) for x in (lse_TN, delta_TN, dq_TND))
        for first in range(0, shape[1], CAUSAL_ROWS):
            end = min(first + CAUSAL_ROWS, shape[1])
            mask, rows = kv.causal_mask[: end - first, : end - first], slice(first, end)
            partial_dq, partial_dk, partial_dv = tiles.matmul_backward(
                do[:, rows], q[:, rows], k[:, :end], v[:, :end], lse[:, rows], delta[:, rows], mask
            )
            dq[:, rows].add_(partial_dq, alpha=kv.scale)
            dk[:, :end] += partial_dk
            dv[:, :end] += partial_dv
