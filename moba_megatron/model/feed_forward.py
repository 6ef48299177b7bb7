"""The feed-forward of long sequences in chunks of tokens: activations of one chunk are in memory at a time.

A feed-forward processes each token separately, so it can process tokens in chunks. Forward keeps only the input.
Backward takes one piece after the other: forward again, then its gradients. Those of the weights are summed over the
pieces in fp32 and leave as one gradient: megatron-core's data parallelism starts to reduce a bucket when each of its
weights has its gradient, so a gradient for every piece would be reduced too early.

The layer stays megatron-core's; tensor and sequence parallelism exchange a piece at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.mlp import MLP
from torch import Tensor


def chunk_feed_forward(model: GPTModel, tokens: int) -> None:
    """Let every dense feed-forward of a model take at most `tokens` tokens at a time.

    Args:
        model: this rank's part of the layers, as built.
        tokens: of all tensor-parallel ranks together under sequence parallelism, which share one sequence.
    """
    for layer in model.decoder.layers:
        if isinstance(layer.mlp, MLP):
            layer.mlp.forward = _in_chunks(layer.mlp, tokens)


def _in_chunks(mlp: MLP, tokens: int) -> Callable[..., tuple[Tensor, None]]:
    whole = mlp.forward
    if mlp.config.add_bias_linear:
        raise ValueError("a feed-forward with a bias is not supported in chunks")
    # Fused, each piece would add its gradient to the whole in the whole's precision.
    for linear in (mlp.linear_fc1, mlp.linear_fc2):
        for fusion in ("fuse_wgrad_accumulation", "gradient_accumulation_fusion"):
            if getattr(linear, fusion, False):
                setattr(linear, fusion, False)
    ranks = mlp.config.tensor_model_parallel_size if mlp.config.sequence_parallel else 1
    weights = list(mlp.parameters())

    def forward(hidden: Tensor, **unused: Any) -> tuple[Tensor, None]:
        rows = max(1, tokens // (ranks * hidden.shape[1]))
        return _FeedForward.apply(lambda piece: whole(piece)[0], rows, hidden, *weights), None

    return forward


class _FeedForward(torch.autograd.Function):
    """hidden [s, b, h] -> [s, b, h], `rows` of s at a time; the weights are inputs so that gradients leave once."""

    @staticmethod
    def forward(
        ctx: Any, feed_forward: Callable[[Tensor], Tensor], rows: int, hidden: Tensor, *weights: Tensor
    ) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.feed_forward, ctx.rows, ctx.weights = feed_forward, rows, weights
        out = torch.empty_like(hidden)
        for piece, place in zip(hidden.split(rows), out.split(rows), strict=True):
            place.copy_(feed_forward(piece))
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Any, ...]:
        (hidden,), rows = ctx.saved_tensors, ctx.rows
        trained = [weight for weight in ctx.weights if weight.requires_grad]
        d_hidden = torch.empty_like(hidden)
        sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in trained]
        for piece, d_piece, place in zip(hidden.split(rows), d_out.split(rows), d_hidden.split(rows), strict=True):
            piece = piece.detach().requires_grad_()
            with torch.enable_grad():
                out = ctx.feed_forward(piece)
            d_in, *d_weights = torch.autograd.grad(out, [piece, *trained], d_piece)
            place.copy_(d_in)
            for total, gradient in zip(sums, d_weights, strict=True):
                total.add_(gradient)
        found = iter(sums)
        d_weights = [next(found).to(w.dtype) if w.requires_grad else None for w in ctx.weights]
        return None, None, d_hidden, *d_weights
