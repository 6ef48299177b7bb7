"""Trading tokens for heads (`a2a`): afterwards a rank holds the tokens of all ranks of its group, and some of the
heads (DeepSpeed Ulysses, arXiv 2309.14509).

Both directions are copies, and each is the other's gradient, so nothing is rounded and nothing added. Query and kv
heads are cut alike: rank i gets the i-th of I equal cuts of both, and so all query heads of its kv heads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moba_megatron.parallel.exchange_kind import ExchangeKind, Levels, Message, RankSizes, head_divisors, heads_of
from moba_megatron.parallel.wire import Wire


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, wire: Wire, order: Tensor, *tensors: Tensor):
        ctx.wire, ctx.order = wire, order
        ctx.heads = [tensor.shape[1] for tensor in tensors]
        return tuple(_to_heads(wire, order, list(tensors)))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):
        return None, None, *_to_tokens(ctx.wire, ctx.order, list(gradients))


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, wire: Wire, order: Tensor, tensor: Tensor):
        ctx.wire, ctx.order = wire, order
        return _to_tokens(wire, order, [tensor])[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return None, None, _to_heads(ctx.wire, ctx.order, [gradient])[0]


def to_heads(wire: Wire, order: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """All tokens of the group's ranks, some of the heads.

    Args:
        order: int64 [I t], for each token of the result its row among the ranks' tokens one after the other.
        tensors: [t, H, D] each, H a multiple of the group's I ranks.

    Returns:
        [I t, H / I, D] each. Differentiable.
    """
    return _ToHeads.apply(wire, order, *tensors)


def to_tokens(wire: Wire, order: Tensor, tensor: Tensor) -> Tensor:
    """The inverse of `to_heads` for one tensor [I t, H / I, D]: [t, H, D]. Differentiable."""
    return _ToTokens.apply(wire, order, tensor)


def _to_heads(wire: Wire, order: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """One message for all tensors: [I, t, sum of H / I, D]."""
    cut = [tensor.unflatten(1, (wire.size, -1)).transpose(0, 1) for tensor in tensors]
    received = wire.all_to_all(torch.cat(cut, dim=2).flatten(0, 1), "heads").wait()
    own = received.split([tensor.shape[2] for tensor in cut], dim=1)
    return [tensor.index_select(0, order) for tensor in own]


def _to_tokens(wire: Wire, order: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    widths = [tensor.shape[1] for tensor in tensors]
    joined = torch.cat(tensors, dim=1)
    message = torch.empty_like(joined)
    message[order] = joined
    received = wire.all_to_all(message, "heads").wait().unflatten(0, (wire.size, -1))
    return [tensor.transpose(0, 1).flatten(1, 2) for tensor in received.split(widths, dim=2)]


class AllToAll(ExchangeKind):
    """The exchange of this module: afterwards each rank attends as one rank does."""

    name = "a2a"
    trades_heads = True
    sends_summaries = False
    saved_kv = 2

    def refusal(self, sizes: RankSizes, context_size: int, levels: Levels | None = None) -> str | None:
        """See `ExchangeKind`."""
        divisors = head_divisors(context_size, sizes)
        if context_size in divisors:
            return None
        best = divisors[-1]
        mixed = f", or the exchange a2a+p2p with [{best}, {context_size // best}]" if best > 1 else ""
        return (
            f"exchange {self.name}: {context_size} context-parallel ranks do not divide {heads_of(sizes)}: use a "
            f"context-parallel size of {' or '.join(map(str, divisors))}{mixed}, or p2p"
        )

    def messages(
        self, sizes: RankSizes, context_size: int, levels: Levels | None = None, remote_owners: float | None = None
    ) -> list[Message]:
        """See `ExchangeKind`."""
        width = 2 * sizes.query_width + sizes.kv_width
        once = (context_size - 1) * sizes.tokens * width * sizes.element_bytes // context_size
        return [Message(once, once, context_size)]

    def buffers(self, sizes: RankSizes, context_size: int, levels: Levels | None = None) -> int:
        """Heads as messages, and as what is made of them."""
        return 2 * sizes.tokens * (sizes.query_width + sizes.kv_width) * sizes.element_bytes


A2A = AllToAll()
