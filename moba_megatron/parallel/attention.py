"""Attention over a sequence whose tokens lie on several ranks: MoBA, or full causal attention.

One autograd function serves every exchange: attend the keys of one's own block at hand while the block summaries (if
the selection asks for any) travel, choose past blocks for one's own queries among all blocks of the pack, then work
through the partial attentions that the exchange yields and combine by log-sum-exp. The backward pass takes each with
the output and the log-sum-exp of the whole attention, so that what they give to the gradients simply adds up. Full
attention is the case of one block per document, in which nothing is chosen.

| exchange | what happens |
|---|---|
| `p2p` | keys and values travel a ring |
| `all_gather` | keys and values of all ranks are gathered, a kv head at a time |
| `a2a` | each rank gets all tokens and some of the heads, and attends as one rank does: the same bits |
| `a2a+p2p` | `a2a` within a group of neighbours, `p2p` between the groups |
| `dispatch` | queries travel to the owners of their blocks |

The names but for `dispatch` are megatron-core's `cp_comm_type`. Under activation recomputation everything is computed
and exchanged again, identically: nothing outlives a call and its backward pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moba_megatron.ops import full_attention, moba_attention, resolve_backend
from moba_megatron.ops.fragments import Keys
from moba_megatron.ops.layout import check_inputs, check_settings
from moba_megatron.ops.precision import score_dtype, without_autocast
from moba_megatron.ops.selection import MOBA, Selection
from moba_megatron.ops.steps import Steps, check_workspace, has_steps, steps_of
from moba_megatron.parallel.a2a import to_heads, to_tokens
from moba_megatron.parallel.context_plan import ContextPlan, boundaries_on, host_boundaries, inner_order, plan_context
from moba_megatron.parallel.exchange import Exchange, PartialAttention, Queries
from moba_megatron.parallel.exchange_kind import ExchangeKind, Levels, RankSizes
from moba_megatron.parallel.exchanges import EXCHANGES
from moba_megatron.parallel.layout import check_divisible
from moba_megatron.parallel.summaries import SummaryExchange
from moba_megatron.parallel.wire import Wire


@dataclass(frozen=True)
class ContextGroups:
    """The process groups of context parallelism.

    Attributes:
        whole: all ranks that share a sequence, in the order of their shards; they need not be neighbours.
        inner, outer: for `a2a+p2p`: ranks that trade heads, adjacent in `whole`, and ranks of a ring, one from each.
    """

    whole: dist.ProcessGroup
    inner: dist.ProcessGroup | None = None
    outer: dist.ProcessGroup | None = None

    def levels(self, kind: ExchangeKind) -> Levels:
        """(ranks that trade heads, shards) under an exchange.

        Raises:
            ValueError: groups that are missing, or do not lie in `whole` as described.
        """
        size = self.whole.size()
        if not kind.two_levels:
            return (size, 1) if kind.trades_heads else (1, size)
        if self.inner is None or self.outer is None:
            raise ValueError(f"exchange {kind.name!r} needs the groups `inner` and `outer`")
        inner, outer = self.inner.size(), self.outer.size()
        ranks = dist.get_process_group_ranks(self.whole)
        shard = self.whole.rank() // inner
        adjacent = ranks[shard * inner : (shard + 1) * inner]
        across = ranks[self.whole.rank() % inner :: inner]
        if dist.get_process_group_ranks(self.inner) != adjacent or dist.get_process_group_ranks(self.outer) != across:
            raise ValueError(
                f"{kind.name}: of the ranks {ranks}, `inner` must be {adjacent} and `outer` {across}, not "
                f"{dist.get_process_group_ranks(self.inner)} and {dist.get_process_group_ranks(self.outer)}"
            )
        return inner, outer


@without_autocast
def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    cp_groups: ContextGroups,
    exchange: str,
    block_size: int | None,
    top_k: int | Sequence[int] | None,
    softmax_scale: float | None = None,
    backend: str = "auto",
    selection: Selection = MOBA,
    workspace_bytes: int | None = None,
) -> Tensor:
    """Attention of this rank's queries over the keys of all ranks. All ranks of the group call it together.

    Args:
        q: queries [t, N, D] of this rank's tokens after rotary embedding, in the zigzag layout (`layout`).
        k, v: keys and values [t, G, D] of the same tokens, same dtype and device; N a multiple of G.
        cu_seqlens: int32 [documents + 1], *padded* boundaries of the whole pack, from 0 to C t, on the host or on q's
            device, the same on all ranks; None for one document.
        cp_groups: process groups.
        exchange: a name of the table above.
        block_size, top_k: as for `moba_attention`; both None for full causal attention.
        softmax_scale: factor on the scores, 1/sqrt(D) if None.
        backend: as for `moba_attention`. Fragments of blocks, which every exchange but `a2a` has, need `gathered` or
            `triton`.
        selection: how past blocks are chosen; no effect in full attention.
        workspace_bytes: room of each partial attention, see `moba_attention`; no effect in full attention under `a2a`.

    Returns:
        [t, N, D] in q's dtype. Differentiable in q, k and v; selection is a constant.

    Raises:
        ValueError: sizes, boundaries, exchange or backend that do not fit, with the values.
    """
    check_inputs({"q": q, "k": k, "v": v}, None)
    if (block_size is None) != (top_k is None):
        raise ValueError(f"block_size = {block_size} and top_k = {top_k}: give both (MoBA) or none (full attention)")
    if block_size is not None and top_k is not None:
        top_k, selection = selection.with_blocks(top_k, k.shape[1])
        check_settings(block_size, top_k, workspace_bytes)
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange = {exchange!r}: choose one of {', '.join(EXCHANGES)}")
    kind, size = EXCHANGES[exchange], cp_groups.whole.size()
    boundaries = _boundaries(cu_seqlens, q.shape[0], size)
    levels = cp_groups.levels(kind)
    sizes = RankSizes(*q.shape[:2], k.shape[1], q.shape[2], q.element_size(), block_size, top_k)
    reason = kind.refusal(sizes, size, levels)
    if reason:
        raise ValueError(reason)
    name, _ = resolve_backend(backend, q.device, q.dtype)
    if levels[1] > 1 and not has_steps(name):
        raise ValueError(f"backend {name!r} holds whole packs: with exchange {exchange!r} use gathered, or use a2a")
    scale = 1 / math.sqrt(q.shape[2]) if softmax_scale is None else float(softmax_scale)
    if block_size is not None:
        check_workspace(name, workspace_bytes)
    if q.shape[0] == 0:
        # No rows on any rank, but the graph stays connected.
        return q + (k.sum() + v.sum()).to(q.dtype)

    def between_shards(q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        assert group is not None
        return _between_shards(
            q, k, v, boundaries, group, kind, levels, block_size, top_k, scale, steps_of(name, selection),
            workspace_bytes,
        )  # fmt: skip

    if not kind.trades_heads:
        return between_shards(q, k, v, cp_groups.whole)
    wire = Wire(cp_groups.inner if kind.two_levels else cp_groups.whole)
    shard = cp_groups.whole.rank() // levels[0]
    values = host_boundaries(boundaries)
    order = inner_order(values, levels, shard, q.device)
    q, k, v = to_heads(wire, order, q, k, v)
    selection = selection.of_heads(wire.rank * k.shape[1], k.shape[1])
    if levels[1] > 1:
        out = between_shards(q, k, v, cp_groups.outer)
    else:
        whole = {"cu_seqlens": boundaries_on(q.device, values), "softmax_scale": scale, "max_seqlen": _longest(values)}
        if block_size is None:
            out = full_attention(q, k, v, **whole)
        else:
            sizes = {"block_size": block_size, "top_k": selection.blocks(top_k)}
            how = {"backend": backend, "workspace_bytes": workspace_bytes, **selection.settings}
            out = moba_attention(q, k, v, **whole, **sizes, **how)
    return to_tokens(wire, order, out)


def _longest(boundaries: tuple[int, ...]) -> int:
    """Tokens of the longest document."""
    return max(end - start for start, end in itertools.pairwise(boundaries))


def _boundaries(cu_seqlens: Tensor | None, tokens: int, size: int) -> Tensor:
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, tokens * size], dtype=torch.int32)
    values = host_boundaries(cu_seqlens)
    if values[0] != 0 or values[-1] != tokens * size or any(a > b for a, b in zip(values, values[1:], strict=False)):
        raise ValueError(
            f"cu_seqlens must rise from 0 to {size} ranks x {tokens} tokens = {tokens * size} (padded boundaries of a "
            f"whole pack); it runs from {values[0]} to {values[-1]}"
        )
    check_divisible(torch.tensor(values), size)
    return cu_seqlens


def _between_shards(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    boundaries: Tensor,
    group: dist.ProcessGroup,
    kind: ExchangeKind,
    levels: Levels,
    block_size: int | None,
    top_k: int | None,
    scale: float,
    steps: Steps,
    workspace_bytes: int | None,
) -> Tensor:
    assert kind.between is not None, f"{kind.name} leaves shards"
    wire = Wire(group)
    plan = plan_context(boundaries, block_size, levels, wire.rank, q.device)
    num_past = 0 if top_k is None else min(top_k, plan.layout.max_blocks) - 1
    return _ContextAttention.apply(q, k, v, plan, wire, kind.between(wire), num_past, scale, steps, workspace_bytes)


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
    ) -> Tensor:
        q = q.contiguous()
        dtype = score_dtype(q.dtype)
        queries = Queries(
            q,
            lse=torch.full(q.shape[:2], -torch.inf, dtype=dtype, device=q.device),
            out=torch.zeros(q.shape, dtype=dtype, device=q.device),
        )
        nothing = torch.empty(*q.shape[:2], 0, dtype=torch.int32, device=q.device)
        summaries = SummaryExchange(plan, wire, k, steps.summary) if num_past and steps.summary else None
        own_keys = Keys(k, v, q.shape[1] // k.shape[1])
        _attend(steps, PartialAttention(queries, own_keys, nothing, plan.own_blocks), scale, workspace_bytes)
        gathered = summaries.wait() if summaries else None
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
        return out

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, do: Tensor):
        q, k, v, out, lse, ids = ctx.saved_tensors
        do = do.contiguous()
        dq = torch.zeros_like(q, dtype=lse.dtype)
        queries = Queries(q, lse, out, do, ctx.steps.output_delta(do, out), dq)
        dkv = torch.zeros(2, *k.shape, dtype=lse.dtype, device=k.device)
        for partial in ctx.exchange.backward(ctx.plan, queries, k, v, ids, dkv):
            _attend_backward(ctx.steps, partial, ctx.scale, ctx.workspace_bytes)
        return dq.to(q.dtype), dkv[0].to(k.dtype), dkv[1].to(v.dtype), *[None] * 7


def _attend(steps: Steps, partial: PartialAttention, scale: float, workspace_bytes: int | None) -> None:
    queries = partial.queries
    steps.accumulate(
        queries.q, partial.keys, partial.ids, partial.fragment, scale, queries.out, queries.lse, workspace_bytes
    )


def _attend_backward(steps: Steps, partial: PartialAttention, scale: float, workspace_bytes: int | None) -> None:
    queries = partial.queries
    steps.accumulate_backward(
        queries.do, queries.q, partial.keys, partial.ids, partial.fragment, scale,
        queries.out, queries.lse, queries.delta, queries.dq, partial.dk, partial.dv, workspace_bytes,
    )  # fmt: skip
