"""Hot blocks under `dispatch`: blocks so sought after that their keys are copied to all ranks instead.

The first block of a document, say, may be chosen by every query of it. If all of them travelled to the block's owner,
the owner would do the work of all ranks. What every rank would ask of the others is counted per block and summed over
the ranks; where an owner's share exceeds `FAIR` times the mean, its most wanted blocks are copied until it does not,
as long as a copy is cheaper than the queries it replaces. Counts are integers, so all ranks decide alike, and what is
attended never changes, only where.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moba_megatron.ops.fragments import Fragment, Keys
from moba_megatron.parallel.exchange import Queries, Task
from moba_megatron.parallel.plan import ContextPlan
from moba_megatron.parallel.wire import Pending, Wire

FAIR = 1.25


@dataclass(frozen=True)
class Load:
    """What `dispatch` asked of the ranks in one forward pass, in (query row, block) pairs from other ranks.

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
    blocks = ids_TNK + plan.queries.first_block_T.to(torch.int32).view(-1, 1, 1)
    counts = torch.bincount(blocks[ids_TNK >= 0], minlength=plan.layout.num_blocks)
    return counts * plan.elsewhere


def choose_copies(plan: ContextPlan, demand_M: Tensor, groups: int) -> tuple[Tensor, Load]:
    """Decide which blocks are copied.

    Args:
        demand_M: int64 [M] on the host, summed over the ranks.
        groups: key heads. A copy brings tokens x `groups` rows of keys to a rank.

    Returns:
        bool [M] on the host, and the load.
    """
    touched = [plan.shard(rank).touched for rank in range(plan.size)]
    loads = [int(demand_M[blocks].sum()) for blocks in touched]
    mean, most = sum(loads) / plan.size, max(loads)
    pays_M = demand_M > plan.layout.block_lengths() * groups
    hot_M = torch.zeros(demand_M.numel(), dtype=torch.bool)
    for rank, blocks in enumerate(touched):
        order = blocks[demand_M[blocks].argsort(descending=True, stable=True)]
        for block in order[pays_M[order] & ~hot_M[order]].tolist():
            if loads[rank] <= FAIR * mean:
                break
            hot_M[block] = True
            for holder, held in enumerate(touched):
                loads[holder] -= int(demand_M[block]) * bool((held == block).any())
    return hot_M, Load(mean, most, max(loads), int(hot_M.sum()))


class Copies:
    """Copies of the hot blocks' keys and values, on all ranks: tasks for this rank's queries.

    Args:
        hot_M: bool [M] on the host.
    """

    def __init__(self, plan: ContextPlan, wire: Wire, hot_M: Tensor, k: Tensor, v: Tensor):
        self.plan, self.wire, self.hot_M = plan, wire, hot_M
        self.rows = [torch.nonzero(hot_M[plan.shard(rank).blocks.pack_block_T]).flatten() for rank in range(plan.size)]
        self.most = max(rows.numel() for rows in self.rows)
        self.mine = self.rows[plan.rank].to(k.device)
        self.pending: Pending | None = None
        if self.most:
            message = k.new_zeros(self.most, 2, *k.shape[1:])
            message[: self.mine.numel()] = torch.stack([k[self.mine], v[self.mine]], dim=1)
            self.pending = wire.all_gather(message, "keys")

    def tasks(self, queries: Queries, ids: Tensor, group_size: int, shares: Tensor | None = None) -> list[Task]:
        """One task for each other rank that owns hot blocks.

        Args:
            shares: in the backward pass, [C, rows, 2, G, D] for the gradients.
        """
        if self.pending is None:
            return []
        copies = self.pending.wait()
        tasks = []
        for source, rows in enumerate(self.rows):
            count = rows.numel()
            if source != self.plan.rank and count:
                keys = Keys(copies[source, :count, 0], copies[source, :count, 1], group_size)
                task = Task(queries, keys, ids, self._fragment(source))
                if shares is not None:
                    task.dk, task.dv = shares[source, :count, 0], shares[source, :count, 1]
                tasks.append(task)
        return tasks

    def shares(self, k: Tensor) -> Tensor:
        """Zeros for the gradients of all copies, in the keys' dtype."""
        return k.new_zeros(self.plan.size, self.most, 2, *k.shape[1:])

    def bring_home(self, shares: Tensor, dkv: Tensor) -> None:
        """Add all ranks' shares of this rank's hot blocks to its gradients, in the order of ranks."""
        if self.pending is None:
            return
        for share in self.wire.all_to_all(shares, "gradients").wait():
            dkv[:, self.mine] += share[: self.mine.numel()].transpose(0, 1)

    def _fragment(self, source: int) -> Fragment:
        """The copied rows of one rank, a unit for each of its hot blocks."""
        blocks, lengths = torch.unique_consecutive(
            self.plan.shard(source).blocks.pack_block_T[self.rows[source]], return_counts=True
        )
        ends = lengths.cumsum(0)
        unit_of_block = torch.full((self.hot_M.numel(),), -1, dtype=torch.int32)
        unit_of_block[blocks] = torch.arange(blocks.numel(), dtype=torch.int32)
        return Fragment(
            units=list(zip((ends - lengths).tolist(), ends.tolist(), strict=True)),
            triangles=[],
            first_block_T=self.plan.queries.first_block_T,
            unit_of_block=unit_of_block.to(self.plan.device),
        )
