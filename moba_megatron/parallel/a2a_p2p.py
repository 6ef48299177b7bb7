"""`a2a+p2p`: heads are traded among neighbours (the inner ranks), and keys travel a ring between their groups, one rank
of each. Both parts are those of `a2a` and `p2p`."""

from __future__ import annotations

from moba_megatron.parallel.a2a import A2A
from moba_megatron.parallel.exchange_kind import ExchangeKind, Levels, Message, RankSizes, head_divisors, heads_of
from moba_megatron.parallel.p2p import P2P, Ring


class TwoLevels(ExchangeKind):
    """See the module."""

    name = "a2a+p2p"
    between = Ring
    trades_heads = True
    two_levels = True
    sends_summaries = False

    def levels(self, context_size: int, sizes: RankSizes, given: Levels | None = None) -> Levels:
        """As given, or as many ranks that trade heads as the heads allow, but not all."""
        if given:
            return given
        inner = max(n for n in head_divisors(context_size, sizes) if n < context_size or context_size == 1)
        return inner, context_size // inner

    def refusal(self, sizes: RankSizes, context_size: int, levels: Levels | None = None) -> str | None:
        """See `ExchangeKind`."""
        divisors = head_divisors(context_size, sizes)
        inner, outer = self.levels(context_size, sizes, levels)
        if inner * outer != context_size:
            return f"exchange {self.name}: levels {inner} x {outer} are not the {context_size} context-parallel ranks"
        if inner not in divisors:
            possible = " or ".join(map(str, divisors))
            return f"exchange {self.name}: {inner} ranks do not divide {heads_of(sizes)}: use {possible} ranks for a2a"
        if inner == 1 or outer == 1:
            instead = P2P.name if inner == 1 else A2A.name
            return f"exchange {self.name} with levels [{inner}, {outer}] is {instead}: use {instead}"
        return None

    def messages(
        self, sizes: RankSizes, context_size: int, levels: Levels | None = None, remote_owners: float | None = None
    ) -> list[Message]:
        """See `ExchangeKind`."""
        inner, outer = self.levels(context_size, sizes, levels)
        ring = P2P.messages(_shard(sizes, inner), outer)
        return [
            *A2A.messages(sizes, inner),
            *(Message(m.forward, m.backward, outer, stride=inner, hidden=m.hidden) for m in ring),
        ]

    def buffers(self, sizes: RankSizes, context_size: int, levels: Levels | None = None) -> int:
        """See `ExchangeKind`."""
        inner, outer = self.levels(context_size, sizes, levels)
        traded = A2A.buffers(sizes, inner)
        return traded + P2P.buffers(_shard(sizes, inner), outer) if outer > 1 else traded


def _shard(sizes: RankSizes, inner: int) -> RankSizes:
    """What a rank holds after trading heads: the tokens of all inner ranks, and its part of the heads."""
    return RankSizes(
        sizes.tokens * inner, sizes.heads // inner, sizes.kv_heads // inner, sizes.head_size, sizes.element_bytes
    )


A2A_P2P = TwoLevels()
