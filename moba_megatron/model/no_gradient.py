"""Gradients of zero."""

from __future__ import annotations

import torch
from torch import Tensor


def without_gradient(output: Tensor, *inputs: Tensor) -> Tensor:
    """The output, from which the inputs get gradients of zero: for weights that a pass does not use, but whose gradient
    is waited for, and for a graph that must reach its start without gradients to carry.

    Args:
        output: of any shape.
        inputs: tensors that want gradients.
    """
    return _ZeroGradient.apply(output, *inputs)


class _ZeroGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output: Tensor, *inputs: Tensor) -> Tensor:
        ctx.like = [(x.shape, x.dtype, x.device) for x in inputs]
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)
