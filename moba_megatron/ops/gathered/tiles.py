"""Attention on one tile: a batch of query rows against a batch of key rows, small enough to hold their scores.

`forward` returns (out, lse). `backward` takes the *whole* attention's lse and delta, not the tile's own: with them
exp(s - lse) is the true probability, so that gradients of a tile need nothing of the other tiles and simply add up
(FlashAttention-2, arXiv 2307.08691, algorithm 2).

Two implementations. Matrix products on any device, in fp32 (fp64 for fp64 inputs): on a CPU they are faster than
PyTorch's fused kernel at these sizes. And for bf16 and fp16 on a CPU that fused kernel, which multiplies in the input's
dtype with fp32 sums (no matrix product of PyTorch does so on a CPU) and returns its log-sum-exp; its outputs are in the
input's dtype.

Shapes: q, out, do [b, n, D]; k, v [b, m, D]; lse, delta [b, n] fp32 or wider.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_fused_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def uses_fused_kernel(tensor: Tensor) -> bool:
    """Whether tiles of such tensors go through PyTorch's fused attention kernel for CPU: where the CPU multiplies in
    that dtype. Elsewhere the kernel emulates it, several times slower than fp32."""
    return tensor.device.type == "cpu" and _multiplies_in(tensor.dtype)


@cache
def _multiplies_in(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported()


def matmul_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention of one tile by matrix products; inputs in fp32 or wider.

    Args:
        q: queries times the scale of the scores.
        mask: bool [n, up to m], true where a row does not see one of the last keys. Such scores are overwritten, not
            added to, so that not even a NaN among unseen keys reaches the row. (One among unseen values does: 0 x NaN.)
    """
    s = torch.bmm(q, k.transpose(1, 2))
    if mask is not None:
        s[..., -mask.shape[-1] :].masked_fill_(mask, -torch.inf)
    m = s.amax(dim=-1, keepdim=True)
    p = s.sub_(m).exp_()
    l = p.sum(dim=-1, keepdim=True)
    out = torch.bmm(p, v).div_(l)
    return out, m.add_(l.log_()).squeeze(-1)


def matmul_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq [b, n, D], dk and dv [b, m, D] of one tile by matrix products; inputs in fp32 or wider.

    Args:
        q: queries times the scale of the scores, as in the forward pass.

    Returns:
        dq is that of the scaled queries: times the scale it is that of the queries.
    """
    s = torch.baddbmm(lse.unsqueeze(-1), q, k.transpose(1, 2), beta=-1)
    if mask is not None:
        s[..., -mask.shape[-1] :].masked_fill_(mask, -torch.inf)
    p = s.exp_()
    dv = torch.bmm(p.transpose(1, 2), do)
    ds = p.mul_(torch.baddbmm(delta.unsqueeze(-1), do, v.transpose(1, 2), beta=-1))
    dk = torch.bmm(ds.transpose(1, 2), q)
    return torch.bmm(ds, k), dk, dv


def fused_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool = False) -> tuple[Tensor, Tensor]:
    """Attention of one tile by PyTorch's fused kernel for CPU; with `is_causal`, n = m."""
    out, lse = _fused_forward(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), 0.0, is_causal, scale=scale)
    return out.squeeze(1), lse.squeeze(1)


def fused_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one tile by PyTorch's fused kernel for CPU, which makes delta from `out` itself."""
    one_head = (x.unsqueeze(1) for x in (do, q, k, v, out, lse))
    return tuple(x.squeeze(1) for x in _fused_backward(*one_head, 0.0, False, scale=scale))
