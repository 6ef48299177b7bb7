"""Partial results of past blocks combined into those of query rows, each row's in slot order.

Each row picks its entries by the inverse permutation of the index: outputs are combined by log-sum-exp in fp32, parts
of dq added.

Legend: T tokens, N query heads, D head size, K slots of a row, t tokens of a range, H heads of a range, P entries with
padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moba_megatron.ops.combine import combine_weights
from moba_megatron.ops.gathered.index import Index
from moba_megatron.ops.gathered.row_sums import sums_of_chosen
from moba_megatron.ops.precision import score_dtype

TOKENS_AT_ONCE = 4096


def combine_forward(
    index: Index,
    partial_out_PD: Tensor,
    partial_lse_P: Tensor,
    out_TND: Tensor,
    lse_TN: Tensor,
    block_lse_TNK: Tensor | None = None,
) -> None:
    """Combine the entries' outputs with out and lse, in place, a few tokens at a time; and each entry's log-sum-exp
    with that of its block, if these are asked for."""
    out_tHD, lse_tH = (x[index.tokens, index.heads] for x in (out_TND, lse_TN))
    for first in range(0, out_tHD.shape[0], TOKENS_AT_ONCE):
        tokens = slice(first, first + TOKENS_AT_ONCE)
        place_tHK = index.place_tHK[tokens]
        partial_lse_tHK = partial_lse_P[place_tHK]
        if block_lse_TNK is not None:
            add_block_lse(block_lse_TNK[index.tokens, index.heads][tokens], partial_lse_tHK)
        partial_lse_KtH = partial_lse_tHK.permute(2, 0, 1)
        weights, lse_tH[tokens] = combine_weights(torch.cat([lse_tH[None, tokens], partial_lse_KtH]))
        of_slots = weights[1:].permute(1, 2, 0).flatten(0, 1)
        acc_tHD = sums_of_chosen(partial_out_PD, place_tHK.flatten(0, 1), of_slots).view(out_tHD[tokens].shape)
        out_tHD[tokens] = acc_tHD.addcmul_(out_tHD[tokens].to(acc_tHD.dtype), weights[0].unsqueeze(-1))


def add_block_lse(block_lse_tHK: Tensor, partial_lse_tHK: Tensor) -> None:
    """Combine log-sum-exps of slots with those of chosen blocks, in place; a slot of the own block stays out."""
    torch.logaddexp(block_lse_tHK, partial_lse_tHK[..., : block_lse_tHK.shape[2]], out=block_lse_tHK)


def combine_backward(index: Index, partial_dq_PD: Tensor, dq_TND: Tensor, factor: float) -> None:
    """Add the entries' dq times a factor, in place."""
    dq_tHD = dq_TND[index.tokens, index.heads]
    for first in range(0, dq_tHD.shape[0], TOKENS_AT_ONCE):
        tokens = slice(first, first + TOKENS_AT_ONCE)
        partial_dq = sums_of_chosen(partial_dq_PD, index.place_tHK[tokens].flatten(0, 1))
        dq_tHD[tokens].add_(partial_dq.view(dq_tHD[tokens].shape), alpha=factor)


def output_delta(do_TND: Tensor, out_TND: Tensor) -> Tensor:
    """[T, N] in fp32 or wider: inner products of the output and its gradient, a few tokens at a time to spare wide
    copies."""
    dtype = score_dtype(do_TND.dtype)
    chunks = zip(do_TND.split(TOKENS_AT_ONCE), out_TND.split(TOKENS_AT_ONCE), strict=True)
    return torch.cat([(do.to(dtype) * out).sum(dim=-1) for do, out in chunks])
