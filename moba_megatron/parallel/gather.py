"""`all_gather`: the keys and values of all ranks, one key head (with its group of query heads) at a time.

While one key head is attended the next one arrives, so two of them are resident. Gradients of keys and values go
home the same way: each rank sends every owner its share, in the keys' dtype, and the owner adds the shares in the order
of ranks in fp32 or wider, so that two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moba_megatron.ops.fragments import Keys
from moba_megatron.parallel.context_plan import ContextPlan
from moba_megatron.parallel.exchange import KeyExchange, Queries, Task
from moba_megatron.parallel.exchange_kind import ExchangeKind, Levels, Message, Sizes, wide_output
from moba_megatron.parallel.wire import Pending


class Gather(KeyExchange):
    """See the module."""

    def backward(
        self, plan: ContextPlan, queries: Queries, k: Tensor, v: Tensor, ids: Tensor, dkv: Tensor
    ) -> Iterator[Task]:
        """See `Exchange`."""
        size = self.wire.size
        going: list[tuple[int, Pending]] = []
        shares = None
        for source, keys in self.shards(queries.q, k, v):
            if source == plan.rank:
                shares = k.new_empty(size, 2, *keys.k.shape)
                own = dkv[:, :, keys.first : keys.first + 1]
                yield Task(queries, keys, ids, plan.fragment(source), own[0], own[1])
                # The owner's share stays in its wide dtype.
                shares[source] = 0
            else:
                yield Task(queries, keys, ids, plan.fragment(source), shares[source, 0], shares[source, 1])
            if source == (plan.rank + 1) % size:
                going.append((keys.first, self.wire.all_to_all(shares, "gradients")))
                self._add(dkv, going[:-1])
                going = going[-1:]
        self._add(dkv, going)

    @staticmethod
    def _add(dkv: Tensor, arrived: list[tuple[int, Pending]]) -> None:
        for head, pending in arrived:
            for share in pending.wait():
                dkv[:, :, head : head + 1] += share

    def shards(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[int, Keys]]:
        """(rank of origin, keys and values of a head): for each key head all ranks, this rank's own first."""
        size, rank, num_groups = self.wire.size, self.wire.rank, k.shape[1]

        def begin(head: int) -> Pending:
            return self.wire.all_gather(torch.stack([x[:, head : head + 1] for x in (k, v)]), "keys")

        arriving = begin(0)
        for head in range(num_groups):
            shards = arriving.wait()
            if head + 1 < num_groups:
                arriving = begin(head + 1)
            for step in range(size):
                source = (rank - step) % size
                yield source, Keys(shards[source, 0], shards[source, 1], q.shape[1] // num_groups, first=head)


class AllGather(ExchangeKind):
    """The exchange of this module."""

    name = "all_gather"
    between = Gather
    in_auto = False

    def messages(
        self, sizes: Sizes, context_size: int, levels: Levels | None = None, remote_owners: float | None = None
    ) -> list[Message]:
        """See `ExchangeKind`."""
        once = (context_size - 1) * sizes.tokens * sizes.kv_width * sizes.element_bytes
        return [Message(once, 2 * once, context_size, hidden=True)]

    def buffers(self, sizes: Sizes, context_size: int, levels: Levels | None = None) -> int:
        """Two key heads of all ranks and their gradients, and the gradients of one's own."""
        shard = sizes.tokens * sizes.kv_width
        gathered = 2 * shard // sizes.kv_heads * context_size * sizes.element_bytes
        return 2 * gathered + shard * sizes.score_bytes + wide_output(sizes)


ALL_GATHER = AllGather()
