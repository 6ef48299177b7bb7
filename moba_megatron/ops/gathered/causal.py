"""Causal spans, forward and backward: tokens that attend themselves (own blocks, in a whole pack), in batched tiles.

Rows are taken `CAUSAL_ROWS` at a time, each against the keys up to its last row, so that little above the diagonal is
computed.

Legend: T query tokens, N query heads, S key rows, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from moba_megatron.ops.gathered import tiles
from moba_megatron.ops.gathered.kv_heads import CAUSAL_ROWS, KVHead


def _causal_tiles(kv: KVHead) -> Iterator[tuple[int, slice, tuple[int, int]]]:
    """Tiles of a few adjacent causal spans at a time: (head, tokens, (spans, tokens of each))."""
    for start, spans, length in kv.fragment.causal_spans:
        step = max(1, kv.scores_budget // (min(length, CAUSAL_ROWS) * length))
        for head in range(kv.heads.start, kv.heads.stop):
            for first in range(0, spans, step):
                count = min(step, spans - first)
                begin = start + first * length
                yield head, slice(begin, begin + count * length), (count, length)


def causal_forward(kv: KVHead, out_TND: Tensor, lse_TN: Tensor) -> None:
    """Write out and lse of all rows in causal spans."""
    for head, tokens, shape in _causal_tiles(kv):
        q, k, v = (x.unflatten(0, shape) for x in (kv.q[tokens, head], kv.k[tokens], kv.v[tokens]))
        out, lse = out_TND[tokens, head].unflatten(0, shape), lse_TN[tokens, head].unflatten(0, shape)
        if tiles.uses_fused_kernel(q):
            tile_out, tile_lse = tiles.fused_forward(q.contiguous(), k, v, kv.scale, is_causal=True)
            out.copy_(tile_out)
            lse.copy_(tile_lse)
            continue
        k, v = k.to(kv.dtype), v.to(kv.dtype)
        for first in range(0, shape[1], CAUSAL_ROWS):
            end = min(first + CAUSAL_ROWS, shape[1])
            mask, rows = kv.causal_mask[: end - first, : end - first], slice(first, end)
            out[:, rows], lse[:, rows] = tiles.matmul_forward(
                q[:, rows].to(kv.dtype), k[:, :end], v[:, :end], kv.scale, mask
            )


def causal_backward(
    kv: KVHead, do_TND: Tensor, lse_TN: Tensor, delta_TN: Tensor, dq_TND: Tensor, dk_SD: Tensor, dv_SD: Tensor
) -> None:
    """Add what the causal spans give to dq [T, N, D], dk and dv [S, D]."""
    for head, tokens, shape in _causal_tiles(kv):
        sources = (kv.q[tokens, head], do_TND[tokens, head], kv.k[tokens], kv.v[tokens])
        q, do, k, v = (x.unflatten(0, shape).to(kv.dtype) for x in sources)
        lse, delta = (x[tokens, head].unflatten(0, shape) for x in (lse_TN, delta_TN))
        dq, dk, dv = (x[tokens].unflatten(0, shape) for x in (dq_TND[:, head], dk_SD, dv_SD))
        for first in range(0, shape[1], CAUSAL_ROWS):
            end = min(first + CAUSAL_ROWS, shape[1])
            mask, rows = kv.causal_mask[: end - first, : end - first], slice(first, end)
            partial_dq, partial_dk, partial_dv = tiles.matmul_backward(
                do[:, rows], q[:, rows], k[:, :end], v[:, :end], lse[:, rows], delta[:, rows], kv.scale, mask
            )
            dq[:, rows] += partial_dq
            dk[:, :end] += partial_dk
            dv[:, :end] += partial_dv
