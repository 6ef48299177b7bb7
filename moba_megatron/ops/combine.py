"""Combining attention over some of the keys into attention over all of them, by log-sum-exp.

A partial result is (out, lse): the softmax-weighted mean of the values over its keys, and the logarithm of the sum of
exponentials of its scaled scores. The whole is the mean of the partial outputs weighted by exp(partial_lse - lse),
where lse is the log-sum-exp of the partial lse. A partial result without keys has lse = -inf and weight 0; a row
without any keys gives 0 and lse = -inf, never NaN. All in fp32 or wider.

Legend: P partial results, X rows, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def combine_weights(lse_PX: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of partial results and the log-sum-exp of the whole.

    Args:
        lse_PX: [P, rows...] in fp32 or wider, -inf where a partial result has no keys.

    Returns:
        Weights [P, rows...] that sum to 1 (to 0 in a row without keys), and lse [rows...].

    >>> weights, lse = combine_weights(torch.tensor([[0.0], [float("-inf")]]))
    >>> weights.flatten().tolist(), lse.tolist()
    ([1.0, 0.0], [0.0])
    """
    m = lse_PX.amax(dim=0)
    # exp(-inf - -inf) is NaN: rows without keys are shifted by 0 instead.
    shift = torch.where(m == -torch.inf, 0, m)
    weights_PX = (lse_PX - shift).exp_()
    l = weights_PX.sum(dim=0)
    weights_PX /= torch.where(l == 0, 1, l)
    return weights_PX, shift + l.log()


def combine(out_PXD: Tensor, lse_PX: Tensor) -> tuple[Tensor, Tensor]:
    """Combine partial outputs.

    Args:
        out_PXD: [P, rows..., D], finite, in any floating dtype.
        lse_PX: [P, rows...] in fp32 or wider.

    Returns:
        out [rows..., D] in lse's dtype, and lse [rows...].
    """
    weights_PX, lse_X = combine_weights(lse_PX)
    out_XD = torch.zeros(out_PXD.shape[1:], dtype=lse_PX.dtype, device=out_PXD.device)
    for out, weight in zip(out_PXD, weights_PX, strict=True):
        out_XD.addcmul_(out.to(out_XD.dtype), weight.unsqueeze(-1))
    return out_XD, lse_X
