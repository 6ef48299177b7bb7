"""Partial results of past blocks combined into those of query rows, each row's in slot order.

Each row picks its entries by the inverse permutation of the index: outputs are combined by log-sum-exp in fp32, parts
of dq added.

Legend: T tokens, N query heads, D head size, K slots of a row, t tokens of a range, H heads of a range, E entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moba_megatron.ops.combine import combine_weights
from moba_megatron.ops.gathered.index import Index
from moba_megatron.ops.precision import score_dtype

TOKENS_AT_ONCE = 4096


def combine_forward(
    index: Index, partial_out_ED: Tensor, partial_lse_E: Tensor, out_TND: Tensor, lse_TN: Tensor
) -> None:
    """Combine the entries' outputs with out and lse, in place, a few tokens at a time."""
    out_tHD, lse_tH = (x[index.tokens, index.heads] for x in (out_TND, lse_TN))
    for first in range(0, out_tHD.shape[0], TOKENS_AT_ONCE):
        tokens = slice(first, first + TOKENS_AT_ONCE)
        place_KtH = index.place_tHK[tokens].permute(2, 0, 1)
        weights, lse_tH[tokens] = combine_weights(torch.cat([lse_tH[None, tokens], partial_lse_E[place_KtH]]))
        acc = out_tHD[tokens] * weights[0].unsqueeze(-1)
        for place, weight in zip(place_KtH, weights[1:], strict=True):
            partial_out = partial_out_ED.index_select(0, place.flatten()).view(acc.shape)
            acc.addcmul_(partial_out.to(acc.dtype), weight.unsqueeze(-1))
        out_tHD[tokens] = acc


def combine_backward(index: Index, partial_dq_ED: Tensor, dq_TND: Tensor) -> None:
    """Add the entries' dq, in place."""
    dq_tHD = dq_TND[index.tokens, index.heads]
    for first in range(0, dq_tHD.shape[0], TOKENS_AT_ONCE):
        tokens = slice(first, first + TOKENS_AT_ONCE)
        for place in index.place_tHK[tokens].unbind(-1):
            dq_tHD[tokens] += partial_dq_ED.index_select(0, place.flatten()).view(dq_tHD[tokens].shape)


def output_delta(do_TND: Tensor, out_TND: Tensor) -> Tensor:
    """[T, N] in fp32 or wider: inner products of the output and its gradient, a few tokens at a time to spare wide
    copies."""
    dtype = score_dtype(do_TND.dtype)
    chunks = zip(do_TND.split(TOKENS_AT_ONCE), out_TND.split(TOKENS_AT_ONCE), strict=True)
    return torch.cat([(do.to(dtype) * out).sum(dim=-1) for do, out in chunks])
