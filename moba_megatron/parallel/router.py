"""A router (`ops.router`) under context parallelism.

Under every exchange a rank chooses for its own tokens and all of its heads, and learns from them: the means of router
keys go to all ranks as block summaries do (`summaries`), so that keys that all heads share are never cut. Where heads
are traded, the choice travels with the queries, and the shares of the attention come back with the outputs. The
gradient of the means is summed over all ranks, and each rank's router keys get their part of it.

Legend: t tokens of this rank, H router heads, K past blocks per query.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from moba_megatron.ops.dense_loss import dense_loss
from moba_megatron.ops.layout import BlockLayout
from moba_megatron.ops.precision import score_dtype
from moba_megatron.ops.router import Router, RouterLoss, counted_tokens, for_heads
from moba_megatron.ops.router_loss import sparse_loss
from moba_megatron.ops.steps import Steps
from moba_megatron.parallel.a2a import to_heads
from moba_megatron.parallel.context_plan import ContextPlan
from moba_megatron.parallel.summaries import SummaryExchange
from moba_megatron.parallel.wire import Wire


@dataclass(frozen=True)
class Chosen:
    """A choice of blocks for query heads.

    Attributes:
        ids: int32 [T, N, K], past blocks by their number within the document, -1 for none.
        block_lse: [T, N, K] in fp32 or wider, -inf: where the log-sum-exps of these blocks are wanted.
    """

    ids: Tensor
    block_lse: Tensor | None


def chosen_for(q: Tensor, ids_THK: Tensor, learns: bool) -> Chosen:
    """The choice of router heads as that of the query heads of q [T, N, D]."""
    ids = for_heads(ids_THK, q.shape[1])
    room = torch.full(ids.shape, -torch.inf, dtype=score_dtype(q.dtype), device=q.device) if learns else None
    return Chosen(ids, room)


class RouterChoice:
    """The choice of a rank's router for its own tokens, under way: made before other work, asked for afterwards. All
    ranks of the wire make it together.

    Args:
        router: of this rank's tokens.
        plan: of the pack, over all ranks of the wire.
        num_past: K, at least 1.
    """

    def __init__(self, router: Router, plan: ContextPlan, wire: Wire, steps: Steps, num_past: int):
        self._router, self._plan, self._wire = router, plan, wire
        self._steps, self._num_past = steps, num_past
        self._summaries = SummaryExchange(plan, wire, router.k.detach())

    @functools.cached_property
    def _means(self) -> Tensor:
        return self._summaries.wait()

    @functools.cached_property
    def ids(self) -> Tensor:
        """int32 [t, H, K]."""
        return self._steps.select_past(self._router.q.detach(), self._means, self._plan.queries, self._num_past)

    def loss(self, masses: Tensor) -> RouterLoss:
        """The sparse loss of this rank's tokens, for the shares of the attention of its chosen blocks [t, H, K]."""
        return sparse_loss(
            self._router, self._means, self.ids, masses, self._plan.queries, self._plan.block_lengths, self._sum
        )

    def _sum(self, gradient: Tensor) -> Tensor:
        return self._wire.all_reduce(gradient.contiguous(), "gradients").wait()


def dense_loss_by_heads(
    router: Router, wire: Wire, order: Tensor, q: Tensor, k: Tensor, layout: BlockLayout, softmax_scale: float
) -> RouterLoss:
    """The dense loss under `a2a`: of the whole pack, for this rank's part of the heads.

    Args:
        router: of this rank's tokens and all heads.
        order: as for `to_heads`.
        q, k: of all tokens and this rank's heads.

    Returns:
        Sums over all tokens of this rank's part of the mean over heads; `tokens` are those of this rank. So the sums
        over the ranks are those of the whole. The gradients of the router's keys are complete.
    """

    def everywhere(tensor: Tensor) -> Tensor:
        """What heads share, [t, 1, C], for all ranks; its gradients are added in the order of ranks."""
        return to_heads(wire, order, tensor.expand(-1, wire.size, -1))[0]

    (router_q,) = to_heads(wire, order, router.q)
    router_k = everywhere(router.k) if router.k.shape[1] == 1 else to_heads(wire, order, router.k)[0]
    mask = None
    if router.loss_mask is not None:
        mask = everywhere(router.loss_mask.to(q.dtype).view(-1, 1, 1)).flatten()
    whole = Router(router_q, router_k, router.loss, mask)
    found = dense_loss(whole, q, k, layout, softmax_scale, all_router_heads=router.q.shape[1])
    return RouterLoss(found.loss, found.entropy, counted_tokens(router).to(found.loss.dtype))
