"""A backend's forward and backward pass over a whole pack, as one function with gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moba_megatron.ops.layout import BlockLayout

Attend = Callable[..., tuple[Tensor, Tensor]]


def with_gradients(forward: Attend, backward: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Attend:
    """Join `attend_forward` and `attend_backward` of a backend: gradients to q, k and v; the returned lse carries none.

    Saved for backward: q, k, v, ids, out and lse.
    """

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, ids, block_lse, *settings):
            out, lse = forward(q, k, v, ids, *settings, block_lse)
            ctx.save_for_backward(q, k, v, out, lse, ids)
            ctx.settings = settings
            ctx.mark_non_differentiable(lse)
            # The log-sum-exp has no gradient, so no zeros are made for it.
            ctx.set_materialize_grads(False)
            return out, lse

        @staticmethod
        @once_differentiable
        def backward(ctx, do, _):
            if do is None:
                return *[None] * 5, *[None] * len(ctx.settings)
            q, k, v, out, lse, ids = ctx.saved_tensors
            return *backward(do, q, k, v, out, lse, ids, *ctx.settings), None, None, *[None] * len(ctx.settings)

    def attend(
        q_TND: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        ids_TNK: Tensor,
        layout: BlockLayout,
        softmax_scale: float,
        workspace_bytes: int | None = None,
        block_lse_TNK: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return Function.apply(q_TND, k_TGD, v_TGD, ids_TNK, block_lse_TNK, layout, softmax_scale, workspace_bytes)

    return attend
