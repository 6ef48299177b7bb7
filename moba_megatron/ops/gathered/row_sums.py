"""Sums of rows, each in the order of its terms, in one pass: an embedding bag is the kernel that PyTorch has for it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


def sums_of_chosen(rows_PD: Tensor, place_XK: Tensor, weight_XK: Tensor | None = None) -> Tensor:
    """[X, D]: sums of the rows at each of X times K places, weighted; in fp32 or wider, whatever the rows' dtype.

    >>> sums_of_chosen(torch.tensor([[1.0], [10.0]]), torch.tensor([[0, 1], [1, 1]])).flatten().tolist()
    [11.0, 20.0]
    """
    if rows_PD.dtype in (torch.float32, torch.float64):
        return embedding_bag(place_XK, rows_PD, mode="sum", per_sample_weights=weight_XK)
    # It would round its sums to 16 bits.
    total = torch.zeros(place_XK.shape[0], rows_PD.shape[1], dtype=torch.float32, device=rows_PD.device)
    for slot, place in enumerate(place_XK.unbind(1)):
        rows = rows_PD.index_select(0, place)
        total = total.add_(rows) if weight_XK is None else total.addcmul_(rows.float(), weight_XK[:, slot, None])
    return total


def sums_of_rows(rows_bmD: Tensor, first_U: Tensor) -> Tensor:
    """[U, m, D]: sums of adjacent [m, D]; those of one sum begin at `first_U`. In fp32 or wider.

    >>> sums_of_rows(torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1), torch.tensor([0, 1])).flatten().tolist()
    [1.0, 6.0]
    """
    if len(first_U) == len(rows_bmD):
        return rows_bmD
    order_b = torch.arange(len(rows_bmD), device=rows_bmD.device)
    return embedding_bag(order_b, rows_bmD.flatten(1), first_U, mode="sum").unflatten(1, rows_bmD.shape[1:])
