"""`p2p`: keys and values travel a ring (Ring Attention, arXiv 2310.01889).

Beside a rank's own shard two are resident: the one that is attended and the one that arrives meanwhile. In the backward
pass they travel again, and behind them their gradients, in fp32 or wider: the rank after the owner makes the first
partial dk and dv, each following one adds its own, and C - 1 hops later they are home, where the owner's join them.
They are thus added in the order of ranks, beginning after the owner.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moba_megatron.ops.fragments import Keys
from moba_megatron.parallel.context_plan import ContextPlan
from moba_megatron.parallel.exchange import KeyExchange, PartialAttention, Queries
from moba_megatron.parallel.exchange_kind import ExchangeKind, Levels, Message, RankSizes, wide_output


class Ring(KeyExchange):
    """See the module."""

    def backward(
        self, plan: ContextPlan, queries: Queries, k: Tensor, v: Tensor, ids: Tensor, dkv: Tensor
    ) -> Iterator[PartialAttention]:
        """See `Exchange`."""
        carried = None
        for source, keys in self.shards(queries.q, k, v):
            own = source == plan.rank
            partial_dkv = dkv if own else torch.empty_like(dkv)
            yield PartialAttention(queries, keys, ids, plan.fragment(source), partial_dkv[0], partial_dkv[1])
            if own:
                continue
            if carried is not None:
                partial_dkv += carried.wait()[0]
            carried = self.wire.shift([partial_dkv], "gradients")
        if carried is not None:
            dkv += carried.wait()[0]

    def shards(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[int, Keys]]:
        """(rank of origin, keys and values), this rank's own first."""
        size, rank, qheads_per_kvhead = self.wire.size, self.wire.rank, q.shape[1] // k.shape[1]
        for step in range(size):
            arriving = self.wire.shift([k, v], "keys") if step + 1 < size else None
            yield (rank - step) % size, Keys(k, v, qheads_per_kvhead)
            if arriving is not None:
                k, v = arriving.wait()


class PeerToPeer(ExchangeKind):
    """The exchange of this module."""

    name = "p2p"
    between = Ring

    def messages(
        self, sizes: RankSizes, context_size: int, levels: Levels | None = None, remote_owners: float | None = None
    ) -> list[Message]:
        """See `ExchangeKind`."""
        once = (context_size - 1) * sizes.tokens * sizes.kv_width
        e, f = sizes.element_bytes, sizes.score_bytes
        return [Message(once * e, once * (e + f), context_size, hidden=True)]

    def buffers(self, sizes: RankSizes, context_size: int, levels: Levels | None = None) -> int:
        """Two shards of keys and values, and three of their gradients."""
        shard = sizes.tokens * sizes.kv_width
        return 2 * shard * sizes.element_bytes + 3 * shard * sizes.score_bytes + wide_output(sizes)


P2P = PeerToPeer()
