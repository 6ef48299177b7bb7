"""The exchanges, and which one `auto` takes.

Sizes are those of one tensor-parallel rank: t tokens (of one context-parallel rank), N query heads, G key heads, D head
size, e bytes an element, f bytes of a score (4, or 8 for fp64), C ranks. Received per rank and layer:

| exchange | forward | backward |
|---|---|---|
| summaries | (C - 1) x most blocks a rank touches x G D f | none |
| `p2p` | (C - 1) t 2 G D e | the same, and (C - 1) t 2 G D f of gradients |
| `all_gather` | (C - 1) t 2 G D e | twice that |
| `a2a` | (C - 1)/C t (2 N + 2 G) D e | the same |
| `a2a+p2p` | `a2a` over I ranks, then `p2p` over C / I of them with I t tokens and G / I heads | the same sums |
| `dispatch` | E t N (2 D e + f + 4 (K - 1)), E remote owners of a row's blocks | E t N (3 D e + 2 f + 4 (K - 1)) |

E depends on the choices: where a row is one document at most min(C - 1, K x parts of a block - 1), the query's own
block counted. Short documents are cut into small chunks, and their blocks lie on more ranks. Blocks that are copied
under `dispatch` replace more queries than they bring rows; the counts that ranks tell each other come on top.

With a router of H heads, J key heads and head size c the summaries are its own, and more travels (`router_traffic`; M
blocks of the pack, I ranks that trade heads):

| what | forward | backward |
|---|---|---|
| summaries, under every exchange | (C - 1) x most blocks a rank touches x J c f | none |
| their gradient, with the sparse loss | none | 2 (C - 1)/C M J c f |
| choice, where heads are traded | (I - 1)/I t H (K - 1) 4 | none |
| shares for the sparse loss, where heads are traded | (I - 1)/I t H (K - 1) f | none |
| the same under `dispatch` | at most E t N (K - 1) f | none |
| queries and keys for the dense loss (`a2a`); J = C for a shared key | (C - 1)/C t (H + J) c e | the same |
| queries and keys of the attention, and the loss mask, for it | (C - 1)/C t ((N + G) D + C) e | none |
"""

from __future__ import annotations

from dataclasses import dataclass

from moba_megatron.parallel.a2a import A2A
from moba_megatron.parallel.a2a_p2p import A2A_P2P
from moba_megatron.parallel.all_gather import ALL_GATHER
from moba_megatron.parallel.dispatch import DISPATCH, most_remote_owners
from moba_megatron.parallel.exchange_kind import ExchangeKind, Levels, RankSizes
from moba_megatron.parallel.p2p import P2P
from moba_megatron.parallel.ring_load import random_choice_factor

EXCHANGES: dict[str, ExchangeKind] = {kind.name: kind for kind in (P2P, ALL_GATHER, A2A, A2A_P2P, DISPATCH)}


@dataclass(frozen=True)
class Traffic:
    """Bytes received per rank and layer."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward


@dataclass(frozen=True)
class ChosenExchange:
    """An exchange, (inner, outer) ranks for one of two levels, and why."""

    name: str
    levels: Levels | None
    reason: str


def refusal(exchange: str, sizes: RankSizes, context_size: int, levels: Levels | None = None) -> str | None:
    """`ExchangeKind.refusal` of an exchange by its name.

    >>> refusal("a2a", RankSizes(8, 8, 2, 64, 2), 4)
    'exchange a2a: 4 context-parallel ranks do not divide 8 query heads and 2 key heads of a tensor-parallel rank: use \
a context-parallel size of 1 or 2, or the exchange a2a+p2p with [2, 2], or p2p'
    """
    return EXCHANGES[exchange].refusal(sizes, context_size, levels)


def traffic(
    exchange: str,
    sizes: RankSizes,
    context_size: int,
    levels: Levels | None = None,
    remote_owners: float | None = None,
) -> Traffic:
    """Bytes of keys, queries, outputs and their gradients (without summaries) by the table above; arguments as for
    `ExchangeKind.messages`."""
    messages = EXCHANGES[exchange].messages(sizes, context_size, levels, remote_owners)
    return Traffic(sum(message.forward for message in messages), sum(message.backward for message in messages))


@dataclass(frozen=True)
class RouterSizes:
    """A router of one tensor-parallel rank.

    Attributes:
        heads, key_heads, head_size: H, J, c.
        loss: `none`, `sparse` or `dense`, the latter with a loss mask.
    """

    heads: int
    key_heads: int
    head_size: int
    loss: str = "none"


def router_traffic(
    exchange: str,
    sizes: RankSizes,
    router: RouterSizes,
    context_size: int,
    levels: Levels | None = None,
    *,
    touched: int,
    blocks: int,
    remote_owners: float | None = None,
) -> Traffic:
    """Bytes that a router brings a rank in one layer, its summaries counted, by the table above.

    Args:
        levels, remote_owners: as for `ExchangeKind.messages`.
        touched: blocks touched by the rank that touches most.
        blocks: M.
    """
    kind, past, f = EXCHANGES[exchange], max(0, (sizes.top_k or 1) - 1), sizes.score_bytes
    learns = router.loss == "sparse"
    forward = backward = 0
    if router.loss == "dense":
        keys = context_size if router.key_heads == 1 else router.key_heads
        of_rank = (context_size - 1) * sizes.tokens * sizes.element_bytes
        backward = of_rank * (router.heads + keys) * router.head_size // context_size
        attended = (sizes.heads + sizes.kv_heads) * sizes.head_size
        forward = backward + of_rank * (attended + context_size) // context_size
    if past == 0:
        return Traffic(forward, backward)
    width = router.key_heads * router.head_size * f
    forward += (context_size - 1) * touched * width
    if kind.trades_heads:
        found = kind.levels(context_size, sizes, levels)
        inner = context_size if found is None else found[0]
        forward += (inner - 1) * sizes.tokens * router.heads * past * (4 + f * learns) // inner
    if kind.depends_on_choices and learns:
        owners = most_remote_owners(sizes, context_size) if remote_owners is None else remote_owners
        forward += int(sizes.tokens * sizes.heads * owners * past * f)
    backward += 2 * blocks * width * (context_size - 1) // context_size * learns
    return Traffic(forward, backward)


def choose_exchange(sizes: RankSizes, context_size: int, levels: Levels | None = None) -> ChosenExchange:
    """What `auto` means for these sizes: `a2a` where the heads allow it, otherwise the fewest bytes in a forward and a
    backward pass among the others but `all_gather`, which holds a whole key head of all ranks in memory and is left to
    those who ask for it.

    Args:
        levels: for an exchange of two levels, if they are given.

    >>> choose_exchange(RankSizes(16384, 32, 8, 128, 2, 4096, 12), 8).name
    'a2a'
    >>> choose_exchange(RankSizes(32768, 32, 8, 128, 2, 4096, 12), 32).name
    'a2a+p2p'
    >>> choose_exchange(RankSizes(16384, 32, 8, 128, 2, 512, 3), 512).name
    'dispatch'
    """
    if A2A.refusal(sizes, context_size) is None:
        ranks = f"{context_size} context-parallel ranks divide {sizes.heads} query and {sizes.kv_heads} key heads"
        return ChosenExchange(A2A.name, None, f"{ranks}, {_mebibytes(traffic(A2A.name, sizes, context_size))}")
    possible = {
        kind.name: traffic(kind.name, sizes, context_size, levels)
        for kind in EXCHANGES.values()
        if kind.in_auto
        and (kind.suits_full or sizes.block_size is not None)
        and kind.refusal(sizes, context_size, levels) is None
    }
    best = min(possible, key=lambda name: possible[name].total)
    others = ", ".join(f"{name} {_mebibytes(bytes_)}" for name, bytes_ in possible.items() if name != best)
    reason = f"fewest bytes a layer, {_mebibytes(possible[best])}" + (f" against {others}" if others else "")
    if waits := EXCHANGES[best].host_waits:
        reason += f"; the host waits for the device {waits} times a layer and forward pass"
    chosen = EXCHANGES[best].levels(context_size, sizes, levels)
    ring = ring_ranks(best, context_size, chosen)
    if ring > 1 and sizes.block_size is not None:
        factor = random_choice_factor(ring, sizes.tokens * context_size / sizes.block_size, sizes.top_k)
        reason += (
            f"; its ring waits for the busiest rank of each step, {factor:.2g} x the attention if choice is random"
        )
    return ChosenExchange(best, chosen, reason)


def ring_ranks(exchange: str, context_size: int, levels: Levels | None) -> int:
    """Ranks of the ring in which an exchange passes keys on; 1 for one without.

    >>> ring_ranks("p2p", 8, None), ring_ranks("a2a+p2p", 8, (4, 2)), ring_ranks("a2a", 8, None)
    (8, 2, 1)
    """
    if exchange == P2P.name:
        return context_size
    return levels[1] if levels is not None else 1


def _mebibytes(bytes_: Traffic) -> str:
    return f"{bytes_.forward / 2**20:.4g} + {bytes_.backward / 2**20:.4g} MiB"
