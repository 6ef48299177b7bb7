"""What an exchange is: a way to bring queries and keys of different ranks together, and their gradients home.

The attention itself (`attention.py`) is the same for all of them. An exchange yields *partial attentions*, each some
queries against some keys that are both here now; when it is asked for the next one, the last one is done. Between two
of them it sends and receives, so that the next keys travel while these are attended.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moba_megatron.ops.fragments import Fragment, Keys
from moba_megatron.parallel.context_plan import ContextPlan
from moba_megatron.parallel.wire import Wire


@dataclass
class Queries:
    """Query rows and what is known of them.

    Attributes:
        q: [T, N, D], contiguous.
        lse: [T, N] in fp32 or wider: so far in the forward pass, of the whole attention in the backward pass.
        out: [T, N, D]: the output so far, fp32 or wider; in the backward pass the whole one in q's dtype, or None where
            it did not travel.
        do, delta, dq: in the backward pass, see `ops.gathered.accumulate_backward`.
        block_lse: [T, N, K] in lse's dtype: of each chosen block so far, where that is asked for in the forward pass.
    """

    q: Tensor
    lse: Tensor
    out: Tensor | None = None
    do: Tensor | None = None
    delta: Tensor | None = None
    dq: Tensor | None = None
    block_lse: Tensor | None = None


@dataclass
class PartialAttention:
    """Queries against keys. In the backward pass `dk` and `dv` [S, G, D] are written."""

    queries: Queries
    keys: Keys
    ids: Tensor
    fragment: Fragment
    dk: Tensor | None = None
    dv: Tensor | None = None


class Exchange(Protocol):
    """Brings queries and keys together. All ranks of the group call the same methods in the same order."""

    def forward(
        self, plan: ContextPlan, queries: Queries, k: Tensor, v: Tensor, ids: Tensor
    ) -> Iterator[PartialAttention]:
        """Partial attentions that complete the attention of this rank's queries.

        Args:
            queries: of this rank; their own blocks' keys on this rank are attended already.
            k, v: [t, G, D] of this rank.
            ids: int32 [t, N, K], chosen past blocks, by their number within the document; K = 0 in full attention.
        """
        ...

    def backward(
        self, plan: ContextPlan, queries: Queries, k: Tensor, v: Tensor, ids: Tensor, dkv: Tensor
    ) -> Iterator[PartialAttention]:
        """Partial attentions of the backward pass; afterwards dq in `queries` and `dkv` [2, t, G, D] (fp32 or wider,
        zero before) are complete."""
        ...


class KeyExchange:
    """What exchanges that bring keys share: this rank's queries against the keys of each rank in turn."""

    def __init__(self, wire: Wire):
        self.wire = wire

    def forward(
        self, plan: ContextPlan, queries: Queries, k: Tensor, v: Tensor, ids: Tensor
    ) -> Iterator[PartialAttention]:
        """See `Exchange`."""
        for source, keys in self.shards(queries.q, k, v):
            yield PartialAttention(
                queries, keys, ids, plan.fragment(source) if source != plan.rank else plan.own_choices
            )

    def shards(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[int, Keys]]:
        """(rank of origin, keys and values of some heads); for these heads this rank's own first."""
        raise NotImplementedError
