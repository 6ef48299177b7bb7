"""Attention between shards: one autograd function over every exchange that leaves a rank some of the tokens.

Attend local keys of the own block while summaries travel. Then choose blocks, compute the partial attentions that the
exchange yields, and combine them by log-sum-exp. The backward pass uses the output and the log-sum-exp of the whole
attention for each partial attention, so their gradients add up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moba_megatron.ops.fragments import Keys
from moba_megatron.ops.precision import score_dtype, without_autocast
from moba_megatron.ops.steps import Steps
from moba_megatron.parallel.context_plan import ContextPlan
from moba_megatron.parallel.exchange import Exchange, PartialAttention, Queries
from moba_megatron.parallel.router import Chosen
from moba_megatron.parallel.summaries import SummaryExchange
from moba_megatron.parallel.wire import Wire


def attend_between_shards(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: ContextPlan,
    wire: Wire,
    exchange: Exchange,
    num_past: int,
    scale: float,
    steps: Steps,
    workspace_bytes: int | None,
    choose: Callable[[], Chosen] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of this rank's queries over the keys of all ranks of the wire.

    Args:
        q, k, v: [t, N, D] and [t, G, D] of this rank's tokens.
        num_past: K, past blocks to choose.
        choose: gives a choice, and is asked for it when own blocks are attended; None: q and k choose.

    Returns:
        out [t, N, D] in q's dtype, differentiable in q, k and v, and lse [t, N] in fp32 or wider, without a gradient.
    """
    return _ContextAttention.apply(q, k, v, plan, wire, exchange, num_past, scale, steps, workspace_bytes, choose)


class _ContextAttention(torch.autograd.Function):
    """See the module. Saved for backward: q, k, v, out, lse and ids of this rank's queries."""

    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: ContextPlan,
        wire: Wire,
        exchange: Exchange,
        num_past: int,
        scale: float,
        steps: Steps,
        workspace_bytes: int | None,
        choose: Callable[[], Chosen] | None,
    ) -> tuple[Tensor, Tensor]:
        q = q.contiguous()
        dtype = score_dtype(q.dtype)
        queries = Queries(
            q,
            lse=torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device),
            out=torch.zeros(q.shape, dtype=dtype, device=q.device),
        )
        nothing = torch.empty(*q.shape[:2], 0, dtype=torch.int32, device=q.device)
        asks = num_past and steps.summary and choose is None
        summaries = SummaryExchange(plan, wire, k, steps.summary) if asks else None
        own_keys = Keys(k, v, q.shape[1] // k.shape[1])
        _attend(steps, PartialAttention(queries, own_keys, nothing, plan.own_blocks), scale, workspace_bytes)
        gathered = summaries.wait() if summaries else None
        if choose is not None:
            chosen = choose()
            ids, queries.block_lse = chosen.ids, chosen.block_lse
        else:
            ids = steps.select_past(q, gathered, plan.queries, num_past) if num_past else nothing
        for partial in exchange.forward(plan, queries, k, v, ids):
            _attend(steps, partial, scale, workspace_bytes)
        out = queries.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, queries.lse, ids)
        ctx.plan, ctx.exchange, ctx.scale, ctx.steps, ctx.workspace_bytes = (
            plan,
            exchange,
            scale,
            steps,
            workspace_bytes,
        )
        ctx.mark_non_differentiable(queries.lse)
        ctx.set_materialize_grads(False)
        return out, queries.lse

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, do: Tensor | None, _):
        if do is None:
            return (None,) * 11
        q, k, v, out, lse, ids = ctx.saved_tensors
        do = do.contiguous()
        dq = torch.zeros_like(q, dtype=lse.dtype)
        queries = Queries(q, lse, out, do, ctx.steps.output_delta(do, out), dq)
        dkv = torch.zeros(2, *k.shape, dtype=lse.dtype, device=k.device)
        for partial in ctx.exchange.backward(ctx.plan, queries, k, v, ids, dkv):
            _attend_backward(ctx.steps, partial, ctx.scale, ctx.workspace_bytes)
        return dq.to(q.dtype), dkv[0].to(k.dtype), dkv[1].to(v.dtype), *[None] * 8


def _attend(steps: Steps, partial: PartialAttention, scale: float, workspace_bytes: int | None) -> None:
    queries = partial.queries
    steps.accumulate(
        queries.q, partial.keys, partial.ids, partial.fragment, scale, queries.out, queries.lse, workspace_bytes,
        queries.block_lse,
    )  # fmt: skip


def _attend_backward(steps: Steps, partial: PartialAttention, scale: float, workspace_bytes: int | None) -> None:
    queries = partial.queries
    steps.accumulate_backward(
        queries.do, queries.q, partial.keys, partial.ids, partial.fragment, scale,
        queries.out, queries.lse, queries.delta, queries.dq, partial.dk, partial.dv, workspace_bytes,
    )  # fmt: skip
