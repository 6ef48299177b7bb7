"""Hot blocks under `dispatch`: so many queries choose them that their keys are copied to all ranks instead.

For instance, every query of a document may choose its first block. If all these queries travelled to the block's owner,
the owner would do the work of all ranks. Each rank counts its queries for each block of the others, and the counts are
summed over the ranks. If the queries for one owner exceed `FAIR` times the mean, its most chosen blocks are copied
until they do not. A block is copied only if its copies to all ranks bring fewer rows than the queries that they
replace, so copies never add traffic. Counts are integers, so all ranks decide alike. The attended keys never change,
only the place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moba_megatron.ops.fragments import Fragment, Keys
from moba_megatron.ops.upload import upload
from moba_megatron.parallel.context_plan import ContextPlan
from moba_megatron.parallel.exchange import PartialAttention, Queries
from moba_megatron.parallel.wire import Pending, Wire

FAIR = 1.25


@dataclass(frozen=True)
class Load:
    """What `dispatch` asked of the ranks in one forward pass, in (query row, chosen block) pairs from other ranks.

    Attributes:
        mean: of all ranks, before anything was copied.
        most: of the busiest rank, before; most_after: with the copies.
        copied_blocks: how many blocks were copied to all ranks.
        guests: query rows that came to this rank.
    """

    mean: float
    most: int
    most_after: int
    copied_blocks: int
    guests: int = 0


def demanded(plan: ContextPlan, ids_TNK: Tensor) -> Tensor:
    """int64 [M]: choices of this rank's queries, by block, that need keys of another rank."""
    blocks_TNK = ids_TNK + plan.queries.first_block_T.view(-1, 1, 1)
    num_blocks = plan.layout.num_blocks
    # Empty choices count for one extra block. A count by `bincount` would make the host wait.
    place = torch.where(ids_TNK >= 0, blocks_TNK, num_blocks).flatten()
    counts = place.new_zeros(num_blocks + 1).scatter_add_(0, place, torch.ones_like(place))
    return counts[:num_blocks] * plan.elsewhere


def choose_copies(plan: ContextPlan, demand_M: Tensor, num_kv_heads: int) -> tuple[Tensor, Load]:
    """Decide which blocks are copied.

    Args:
        demand_M: int64 [M] on the host, summed over the ranks.
        num_kv_heads: a copy brings tokens x `num_kv_heads` rows of keys to each of the other ranks.

    Returns:
        bool [M] on the host, and the load.
    """
    held_CM = plan.held
    loads_C = held_CM @ demand_M
    mean, most = float(loads_C.double().mean()), int(loads_C.max())
    pays_M = demand_M > plan.layout.block_lengths() * num_kv_heads * (plan.size - 1)
    hot_M = torch.zeros(demand_M.numel(), dtype=torch.bool)
    for rank in torch.nonzero(loads_C > FAIR * mean).flatten().tolist():
        blocks = torch.nonzero(held_CM[rank].bool() & pays_M).flatten()
        for block in blocks[demand_M[blocks].argsort(descending=True, stable=True)].tolist():
            if loads_C[rank] <= FAIR * mean:
                break
            if not hot_M[block]:
                hot_M[block] = True
                loads_C -= held_CM[:, block] * demand_M[block]
    return hot_M, Load(mean, most, int(loads_C.max()), int(hot_M.sum()))


class Copies:
    """Copies of the hot blocks' keys and values, on all ranks, for this rank's queries.

    Args:
        hot_M: bool [M] on the host.
    """

    def __init__(self, plan: ContextPlan, wire: Wire, hot_M: Tensor, k: Tensor, v: Tensor):
        self.plan, self.wire, self.hot_M = plan, wire, hot_M
        self.rows = [torch.nonzero(hot_M[plan.shard(rank).blocks.pack_block_T]).flatten() for rank in range(plan.size)]
        self.mine = upload(self.rows[plan.rank], k.device)
        others = [rank != plan.rank for rank in range(plan.size)]
        # To every other rank this rank's rows, from every other rank its own.
        self.sent = [self.mine.numel() * other for other in others]
        self.received = [rows.numel() * other for rows, other in zip(self.rows, others, strict=True)]
        self.pending: Pending | None = None
        if hot_M.any():
            message = torch.stack([k[self.mine], v[self.mine]], dim=1)
            self.pending = wire.all_to_all(message.repeat(plan.size - 1, 1, 1, 1), "keys", self.sent, self.received)

    def partials(
        self, queries: Queries, ids: Tensor, qheads_per_kvhead: int, partial_dkv: Tensor | None = None
    ) -> list[PartialAttention]:
        """One partial attention for each other rank that owns hot blocks.

        Args:
            partial_dkv: in the backward pass, [copied rows, 2, G, D] for the gradients.
        """
        if self.pending is None:
            return []
        copies, partials, end = self.pending.wait(), [], 0
        for source, count in enumerate(self.received):
            start, end = end, end + count
            if count:
                keys = Keys(copies[start:end, 0], copies[start:end, 1], qheads_per_kvhead)
                partial = PartialAttention(queries, keys, ids, self._fragment(source))
                if partial_dkv is not None:
                    partial.dk, partial.dv = partial_dkv[start:end, 0], partial_dkv[start:end, 1]
                partials.append(partial)
        return partials

    def partial_dkv(self, k: Tensor) -> Tensor:
        """Zeros [copied rows, 2, G, D] for the gradients of all copies here, in the keys' dtype."""
        return k.new_zeros(sum(self.received), 2, *k.shape[1:])

    def bring_home(self, partial_dkv: Tensor, dkv: Tensor) -> None:
        """Add what all ranks give to this rank's hot blocks to its gradients, in the order of ranks."""
        if self.pending is None:
            return
        home = self.wire.all_to_all(partial_dkv, "gradients", self.received, self.sent).wait()
        for partial in home.view(-1, self.mine.numel(), *partial_dkv.shape[1:]) if home.shape[0] else ():
            dkv[:, self.mine] += partial.transpose(0, 1)

    def _fragment(self, source: int) -> Fragment:
        """The copied rows of one rank, a kv block for each of its hot blocks."""
        blocks, lengths = torch.unique_consecutive(
            self.plan.shard(source).blocks.pack_block_T[self.rows[source]], return_counts=True
        )
        ends = lengths.cumsum(0)
        kv_block_of_block = torch.full((self.hot_M.numel(),), -1, dtype=torch.int32)
        kv_block_of_block[blocks] = torch.arange(blocks.numel(), dtype=torch.int32)
        return Fragment(
            kv_blocks=list(zip((ends - lengths).tolist(), ends.tolist(), strict=True)),
            causal_spans=[],
            first_block_T=self.plan.queries.first_block_T,
            kv_block_of_block=upload(kv_block_of_block, self.plan.device),
        )
