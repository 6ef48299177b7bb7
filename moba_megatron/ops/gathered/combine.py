"""Partial results of entries combined into those of query rows, in portable PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from moba_megatron.ops.combine import merge_weights
from moba_megatron.ops.gathered.index import Entries
from moba_megatron.ops.precision import score_dtype

TOKENS_OF_MERGE = 4096


def combine_forward(entries: Entries, part_ED: Tensor, part_lse_E: Tensor, out_TND: Tensor, lse_TN: Tensor) -> None:
    """Merge the entries' outputs into out and lse, in place, a few tokens at a time."""
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


def combine_backward(entries: Entries, part_ED: Tensor, dq_TND: Tensor) -> None:
    """Add the entries' gradients, in place and in slot order."""
    dq_tHD = dq_TND[entries.tokens, entries.heads]
    for first in range(0, dq_tHD.shape[0], TOKENS_OF_MERGE):
        tokens = slice(first, first + TOKENS_OF_MERGE)
        for place in entries.place_tHK[tokens].unbind(-1):
            dq_tHD[tokens] += part_ED.index_select(0, place.flatten()).view(dq_tHD[tokens].shape)


def output_delta(dout_TND: Tensor, out_TND: Tensor) -> Tensor:
    """[T, N] in fp32 or wider: inner products of the output and its gradient, a few tokens at a time to spare wide
    copies."""
    dtype = score_dtype(dout_TND.dtype)
    chunks = zip(dout_TND.split(TOKENS_OF_MERGE), out_TND.split(TOKENS_OF_MERGE), strict=True)
    return torch.cat([(dout.to(dtype) * out).sum(dim=-1) for dout, out in chunks])
