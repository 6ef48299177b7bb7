"""Whether an operator computes MoBA: the gate that a setting passes before its speed is reported.

The operator's output and gradients are compared with the definition in fp64, with the ids that `select_blocks` gives,
which are themselves compared with the definition's. Tolerance: for output and each gradient, in the largest error and
in the root mean square, at most twice the error of plain PyTorch in the same dtype, plus rounding. The mean sees a
small factor on everything, the maximum a few wrong rows.

The definition needs a matrix of all scores, so one query head is compared at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from moba_megatron.ops import Router, select_blocks
from moba_megatron.ops.reference import reference_attend, reference_select

# Units of the last place that count as rounding. fp64 has no wider oracle, so the definition's own rounding over
# hundreds of terms counts as well.
ROUNDING, ROUNDING_OF_FP64 = 2, 32
# Share of selected ids that may differ from those of fp64: near-ties.
NEAR_TIES = 1e-3


def disagreement(
    operator: Callable[[Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    *,
    block_size: int,
    top_k: int,
    router: Router | None = None,
) -> str | None:
    """Why the operator is not MoBA on these inputs, None if it is.

    Args:
        operator: from q [T, N, D], k and v [T, G, D] to the output [T, N, D], differentiable.
        q, k, v, dout: one document and the gradient of its output, in one dtype.
        block_size, top_k: of the operator, in tokens and in blocks.
        router: what chooses blocks in the operator.
    """
    ids = select_blocks(q, k, block_size=block_size, top_k=top_k, router=router)[..., 1:]
    choosing = (q, k) if router is None else (router.q, router.k)
    exact_ids = reference_select(*(x.double() for x in choosing), None, block_size, top_k - 1)
    exact_ids = exact_ids.repeat_interleave(q.shape[1] // exact_ids.shape[1], dim=1)
    if top_k > 1 and not bool((ids >= 0).any()):
        return "no past block was selected on the test document"
    if top_k > 1 and float((ids != exact_ids).double().mean()) > NEAR_TIES:
        return f"more than {NEAR_TIES:.1%} of the selected blocks differ from the reference's"
    got = _results(operator, q, k, v, dout)
    want = _by_head(_definition, *(x.double() for x in (q, k, v, dout)), ids, block_size)
    plain = _by_head(_plain, q, k, v, dout, ids, block_size)
    units = ROUNDING_OF_FP64 if q.dtype == torch.float64 else ROUNDING
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), got, want, plain, strict=True):
        for kind, size in (("largest", _largest), ("mean", _root_mean_square)):
            error, bound = size(a - b), 2 * size(c - b) + units * torch.finfo(q.dtype).eps * size(b)
            if not error <= bound:
                return f"{name} differs from the reference by {error:.2e} ({kind} error), allowed {bound:.2e}"
    return None


def _largest(x: Tensor) -> float:
    return float(x.abs().max())


def _root_mean_square(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _results(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def _by_head(
    attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor, ids: Tensor, block_size: int
) -> list[Tensor]:
    """Output and gradients of an attention with a dense mask, one query head after the other."""
    out, dq, dk, dv = (torch.zeros_like(x) for x in (q, q, k, v))
    qheads_per_kvhead = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        one, kv_head = slice(head, head + 1), slice(head // qheads_per_kvhead, head // qheads_per_kvhead + 1)
        results = _results(
            lambda *x, one=one: attention(*x, ids[:, one], block_size),
            q[:, one],
            k[:, kv_head],
            v[:, kv_head],
            dout[:, one],
        )
        out[:, one], dq[:, one] = results[:2]
        dk[:, kv_head] += results[2]
        dv[:, kv_head] += results[3]
    return [out, dq, dk, dv]


def _definition(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, block_size: int) -> Tensor:
    return reference_attend(q, k, v, ids, None, block_size, 1 / math.sqrt(q.shape[2]))[0]


def _plain(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, block_size: int) -> Tensor:
    """What one would write in PyTorch in the inputs' own dtype: one head, one document."""
    position = torch.arange(q.shape[0], device=q.device)
    block = position // block_size
    seen = (block[:, None] == block) & (position[:, None] >= position) | (ids[:, 0, :, None] == block).any(dim=1)
    scores = (q[:, 0] @ k[:, 0].t() / math.sqrt(q.shape[2])).masked_fill(~seen, -torch.inf)
    return (scores.softmax(dim=-1) @ v[:, 0]).unsqueeze(1)
