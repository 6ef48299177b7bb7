"""`all_gather`: the keys and values of all ranks, one kv head (with its query heads) at a time.

While one kv head is attended the next one arrives, so two of them are resident. Gradients of keys and values go home
the same way: each rank sends every owner its partial dk and dv, in the keys' dtype, and the owner adds them in the
order of ranks in fp32 or wider, so that two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moba_megatron.ops.fragments import Keys
from moba_megatron.parallel.context_plan import ContextPlan
from moba_megatron.parallel.exchange import KeyExchange, PartialAttention, Queries
from moba_megatron.parallel.exchange_kind import ExchangeKind, Levels, Message, RankSizes, wide_output
from moba_megatron.parallel.wire import Pending


class Gather(KeyExchange):
    """See the module."""

    def backward(
        self, plan: ContextPlan, queries: Queries, k: Tensor, v: Tensor, ids: Tensor, dkv: Tensor
    ) -> Iterator[PartialAttention]:
        """See `Exchange`."""
        size = self.wire.size
        going: list[tuple[int, Pending]] = []
        partial_dkv = None
        for source, keys in self.shards(queries.q, k, v):
            if source == plan.rank:
                partial_dkv = k.new_empty(size, 2, *keys.k.shape)
                own = dkv[:, :, keys.first_kv_head : keys.first_kv_head + 1]
                yield PartialAttention(queries, keys, ids, plan.fragment(source), own[0], own[1])
                # What the owner itself gives stays in its wide dtype.
                partial_dkv[source] = 0
            else:
                yield PartialAttention(
                    queries, keys, ids, plan.fragment(source), partial_dkv[source, 0], partial_dkv[source, 1]
                )
            if source == (plan.rank + 1) % size:
                going.append((keys.first_kv_head, self.wire.all_to_all(partial_dkv, "gradients")))
                self._add(dkv, going[:-1])
                going = going[-1:]
        self._add(dkv, going)

    @staticmethod
    def _add(dkv: Tensor, arrived: list[tuple[int, Pending]]) -> None:
        for kv_head, pending in arrived:
            for partial_dkv in pending.wait():
                dkv[:, :, kv_head : kv_head + 1] += partial_dkv

    def shards(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[int, Keys]]:
        """(rank of origin, keys and values of a head): for each kv head all ranks, this rank's own first."""
        size, rank, num_kv_heads = self.wire.size, self.wire.rank, k.shape[1]

        def begin(kv_head: int) -> Pending:
            return self.wire.all_gather(torch.stack([x[:, kv_head : kv_head + 1] for x in (k, v)]), "keys")

        arriving = begin(0)
        for kv_head in range(num_kv_heads):
            shards = arriving.wait()
            if kv_head + 1 < num_kv_heads:
                arriving = begin(kv_head + 1)
            for step in range(size):
                source = (rank - step) % size
                yield source, Keys(shards[source, 0], shards[source, 1], q.shape[1] // num_kv_heads, kv_head)


class AllGather(ExchangeKind):
    """The exchange of this module."""

    name = "all_gather"
    between = Gather
    in_auto = False

    def messages(
        self, sizes: RankSizes, context_size: int, levels: Levels | None = None, remote_owners: float | None = None
    ) -> list[Message]:
        """See `ExchangeKind`."""
        once = (context_size - 1) * sizes.tokens * sizes.kv_width * sizes.element_bytes
        return [Message(once, 2 * once, context_size, hidden=True)]

    def buffers(self, sizes: RankSizes, context_size: int, levels: Levels | None = None) -> int:
        """Two key heads of all ranks and their gradients, and the gradients of one's own."""
        shard = sizes.tokens * sizes.kv_width
        gathered = 2 * shard // sizes.kv_heads * context_size * sizes.element_bytes
        return 2 * gathered + shard * sizes.score_bytes + wide_output(sizes)


ALL_GATHER = AllGather()
