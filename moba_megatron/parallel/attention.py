"""Attention over a sequence whose tokens lie on several ranks: MoBA, or full causal attention.

One autograd function serves every exchange (`between_shards`): attend the keys of one's own block at hand while the
block summaries (if the selection asks for any) travel, choose past blocks for one's own queries among all blocks of the
pack, then work through the partial attentions that the exchange yields and combine by log-sum-exp. Full attention is
the case of one block per document, in which nothing is chosen. A router chooses before (`router`).

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

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from moba_megatron.ops import full_attention, moba_attention, resolve_backend
from moba_megatron.ops.kept_layouts import layout_of
from moba_megatron.ops.layout import check_inputs, check_settings
from moba_megatron.ops.precision import without_autocast
from moba_megatron.ops.router import Router, RouterLoss, check_router, check_router_backend, no_loss
from moba_megatron.ops.router_loss import block_masses
from moba_megatron.ops.selection import MOBA, Selection
from moba_megatron.ops.steps import check_workspace, has_steps, steps_of
from moba_megatron.parallel.a2a import to_heads, to_tokens
from moba_megatron.parallel.between_shards import attend_between_shards
from moba_megatron.parallel.context_plan import boundaries_on, host_boundaries, inner_order, plan_context
from moba_megatron.parallel.exchange_kind import ExchangeKind, Levels, RankSizes
from moba_megatron.parallel.exchanges import EXCHANGES
from moba_megatron.parallel.layout import check_divisible
from moba_megatron.parallel.router import Chosen, RouterChoice, chosen_for, dense_loss_by_heads
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
    router: Router | None = None,
) -> Tensor | tuple[Tensor, RouterLoss]:
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
        router: of this rank's tokens, see `moba_attention`; with `gathered` or `triton`.

    Returns:
        [t, N, D] in q's dtype. Differentiable in q, k and v; selection is a constant. With a router that has a loss:
        this and the loss of this rank's tokens; the gradients of its keys are complete.

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
        raise ValueError(
            f"backend {name!r} needs the whole pack on one rank: with exchange {exchange!r} use gathered, or use a2a"
        )
    if router is not None:
        check_router(router, q, k.shape[1], selection)
        _check_router_call(router, block_size, name, kind, levels)
    scale = 1 / math.sqrt(q.shape[2]) if softmax_scale is None else float(softmax_scale)
    if block_size is not None:
        check_workspace(name, workspace_bytes)
    if q.shape[0] == 0:
        # No rows on any rank, but the graph stays connected.
        out = q + (k.sum() + v.sum()).to(q.dtype)
        return (out, no_loss(router)) if router is not None and router.learns else out
    call = _Call(
        boundaries, cp_groups, kind, levels, block_size, top_k, scale, backend, name, selection, workspace_bytes
    )
    if router is None:
        return call.attend(q, k, v)[0]
    return call.attend_with(router, q, k, v)


@dataclass(frozen=True)
class _Call:
    """What is known of a call beside its tensors."""

    boundaries: Tensor
    cp_groups: ContextGroups
    kind: ExchangeKind
    levels: Levels
    block_size: int | None
    top_k: int | None
    scale: float
    backend: str
    name: str
    selection: Selection
    workspace_bytes: int | None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, choice: RouterChoice | None = None, learns: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Out [t, N, D], and the shares of the attention of chosen blocks [t, H, K] if a router learns from them.

        Args:
            choice: of a router; None: q and k choose.
        """
        if not self.kind.trades_heads:
            choose = None if choice is None else functools.cache(lambda: chosen_for(q, choice.ids, learns))
            out, lse = self._between_shards(q, k, v, self.cp_groups.whole, choose)
            return out, block_masses(choose().block_lse, lse, choice.ids.shape[1]) if learns else None
        wire = Wire(self.cp_groups.inner if self.kind.two_levels else self.cp_groups.whole)
        shard = self.cp_groups.whole.rank() // self.levels[0]
        order = inner_order(host_boundaries(self.boundaries), self.levels, shard, q.device)
        q, k, v = to_heads(wire, order, q, k, v)
        choose = None
        if choice is not None:
            (ids,) = to_heads(wire, order, choice.ids)
            choose = functools.cache(lambda: chosen_for(q, ids, learns))
        here = replace(self, selection=self.selection.of_heads(wire.rank * k.shape[1], k.shape[1]))
        if self.levels[1] == 1:
            out, lse = here._whole_pack(q, k, v, choose)
        else:
            out, lse = here._between_shards(q, k, v, self.cp_groups.outer, choose)
        masses = None
        if learns:
            masses = to_tokens(wire, order, block_masses(choose().block_lse, lse, ids.shape[1]))
        return to_tokens(wire, order, out), masses

    def attend_with(self, router: Router, q: Tensor, k: Tensor, v: Tensor) -> Tensor | tuple[Tensor, RouterLoss]:
        """Attention over the blocks that a router chooses, and its loss if it learns."""
        assert self.block_size is not None and self.top_k is not None
        wire, steps = Wire(self.cp_groups.whole), steps_of(self.name, self.selection)
        plan = plan_context(self.boundaries, self.block_size, (1, wire.size), wire.rank, q.device)
        num_past = min(self.top_k, plan.layout.max_blocks) - 1
        fewest = self.selection.fewest_blocks(self.top_k)
        covers = self.backend == "auto" and self.selection.fills_up and fewest >= plan.layout.max_blocks
        if num_past == 0 or (covers and router.loss != "sparse"):
            # None or all are chosen, whoever chooses.
            out, masses, choice = *self.attend(q, k, v), None
        else:
            choice = RouterChoice(router, plan, wire, steps, num_past)
            out, masses = self.attend(q, k, v, choice, router.loss == "sparse")
        if not router.learns:
            return out
        if router.loss == "dense":
            return out, self._dense_loss(router, q, k)
        return out, no_loss(router) if choice is None else choice.loss(masses)

    def _dense_loss(self, router: Router, q: Tensor, k: Tensor) -> RouterLoss:
        """The dense loss of all tokens for the heads at hand after trading."""
        wire, values = Wire(self.cp_groups.whole), host_boundaries(self.boundaries)
        order = inner_order(values, self.levels, 0, q.device)
        q, k = to_heads(wire, order, q.detach(), k.detach())
        layout = layout_of(q, boundaries_on(q.device, values), self.block_size, _longest(values))
        return dense_loss_by_heads(router, wire, order, q, k, layout, self.scale)

    def _between_shards(
        self, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup | None, choose: Callable[[], Chosen] | None
    ) -> tuple[Tensor, Tensor]:
        assert group is not None and self.kind.between is not None, f"{self.kind.name} leaves shards"
        wire = Wire(group)
        plan = plan_context(self.boundaries, self.block_size, self.levels, wire.rank, q.device)
        num_past = 0 if self.top_k is None else min(self.top_k, plan.layout.max_blocks) - 1
        return attend_between_shards(
            q, k, v, plan, wire, self.kind.between(wire), num_past, self.scale, steps_of(self.name, self.selection),
            self.workspace_bytes, choose,
        )  # fmt: skip

    def _whole_pack(
        self, q: Tensor, k: Tensor, v: Tensor, choose: Callable[[], Chosen] | None
    ) -> tuple[Tensor, Tensor | None]:
        values = host_boundaries(self.boundaries)
        cu_seqlens, longest = boundaries_on(q.device, values), _longest(values)
        whole = {"cu_seqlens": cu_seqlens, "softmax_scale": self.scale, "max_seqlen": longest}
        if self.block_size is None:
            return full_attention(q, k, v, **whole), None
        if choose is not None:
            chosen = choose()
            layout = layout_of(q, cu_seqlens, self.block_size, longest)
            steps = steps_of(self.name, self.selection)
            return steps.attend(q, k, v, chosen.ids, layout, self.scale, self.workspace_bytes, chosen.block_lse)
        sizes = {"block_size": self.block_size, "top_k": self.selection.blocks(self.top_k)}
        how = {"backend": self.backend, "workspace_bytes": self.workspace_bytes, **self.selection.settings}
        return moba_attention(q, k, v, **whole, **sizes, **how), None


def _check_router_call(
    router: Router, block_size: int | None, backend: str, kind: ExchangeKind, levels: Levels
) -> None:
    if block_size is None:
        raise ValueError("a router chooses blocks, and full attention has none: give block_size, or no router")
    check_router_backend(router, backend)
    if not has_steps(backend):
        raise ValueError(
            f"backend {backend!r} needs the whole pack on one rank. With a router and context parallelism use gathered "
            "or triton"
        )
    if router.loss == "dense" and levels[1] > 1:
        raise ValueError(
            f"router.loss = 'dense' with exchange {kind.name!r}: the dense loss compares with full attention over "
            "whole packs; use a2a, a context-parallel size of 1, or router.loss = 'sparse'"
        )


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
