"""Own blocks in portable PyTorch: stretches of tokens that attend themselves, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from moba_megatron.ops.gathered import tiles
from moba_megatron.ops.gathered.kv_heads import ROWS_OF_TRIANGLE, Pass


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
