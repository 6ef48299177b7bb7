"""`all_gather`: the keys and values of all ranks, a group of key heads at a time.

While one group of heads is attended the next one arrives, so two of them are resident. Gradients of keys and values go
home the same way: each rank sends every owner its share, in the keys' dtype, and the owner adds the shares in the order
of ranks in fp32 or wider, so that two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moba_megatron.ops.fragments import Keys
from moba_megatron.parallel.exchange import Queries, Task
from moba_megatron.parallel.plan import ContextPlan
from moba_megatron.parallel.wire import Pending, Wire


class Gather:
    """See the module.

    Args:
        heads_at_once: key heads of one gather.
    """

    def __init__(self, wire: Wire, heads_at_once: int = 1):
        self.wire, self.heads_at_once = wire, heads_at_once

    def forward(self, plan: ContextPlan, queries: Queries, k: Tensor, v: Tensor, ids: Tensor) -> Iterator[Task]:
        """See `Exchange`."""
        for source, keys in self._shards(queries.q, k, v):
            yield Task(queries, keys, ids, plan.fragment(source) if source != plan.rank else plan.own_choices)

    def backward(
        self, plan: ContextPlan, queries: Queries, k: Tensor, v: Tensor, ids: Tensor, dkv: Tensor
    ) -> Iterator[Task]:
        """See `Exchange`."""
        size = self.wire.size
        going: list[tuple[slice, Pending]] = []
        shares = None
        for source, keys in self._shards(queries.q, k, v):
            if source == plan.rank:
                shares = k.new_empty(size, 2, *keys.k.shape)
                own = dkv[:, :, keys.first : keys.first + keys.k.shape[1]]
                yield Task(queries, keys, ids, plan.fragment(source), own[0], own[1])
                # The owner's share stays in its wide dtype.
                shares[source] = 0
            else:
                yield Task(queries, keys, ids, plan.fragment(source), shares[source, 0], shares[source, 1])
            if source == (plan.rank + 1) % size:
                heads = slice(keys.first, keys.first + keys.k.shape[1])
                going.append((heads, self.wire.all_to_all(shares, "gradients")))
                self._add(dkv, going[:-1])
                going = going[-1:]
        self._add(dkv, going)

    @staticmethod
    def _add(dkv: Tensor, arrived: list[tuple[slice, Pending]]) -> None:
        for heads, pending in arrived:
            for share in pending.wait():
                dkv[:, :, heads] += share

    def _shards(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[int, Keys]]:
        """(rank of origin, keys and values of some heads): for each group of heads all ranks, this rank's own first."""
        size, rank, group_size = self.wire.size, self.wire.rank, q.shape[1] // k.shape[1]
        groups = [slice(g, min(g + self.heads_at_once, k.shape[1])) for g in range(0, k.shape[1], self.heads_at_once)]

        def begin(heads: slice) -> Pending:
            return self.wire.all_gather(torch.stack([k[:, heads], v[:, heads]]), "keys")

        arriving = begin(groups[0])
        for heads, following in zip(groups, [*groups[1:], None], strict=True):
            shards = arriving.wait()
            if following is not None:
                arriving = begin(following)
            for step in range(size):
                source = (rank - step) % size
                yield source, Keys(shards[source, 0], shards[source, 1], group_size, first=heads.start)
