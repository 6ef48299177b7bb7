"""Bytes that each exchange brings to a rank, which exchanges can run, and which one `auto` takes.

Sizes are those of one tensor-parallel rank: t tokens (of one context-parallel rank), N query heads, G kv heads, D head
size, e bytes an element, f bytes of a score (4, or 8 for fp64), C ranks. Received per rank and layer:

| exchange | forward | backward |
|---|---|---|
| summaries | (C - 1) x most blocks a rank touches x G D f | none |
| `p2p` | (C - 1) t 2 G D e | the same, and (C - 1) t 2 G D f of gradients |
| `all_gather` | (C - 1) t 2 G D e | twice that |
| `a2a` | (C - 1)/C t (2 N + 2 G) D e | the same |
| `a2a+p2p` | `a2a` over I ranks, then `p2p` over C / I of them with I t tokens and G / I heads | the same sums |
| `dispatch` | E t N (2 D e + f + 4 (K - 1)), E remote owners of a row's blocks | E t N (3 D e + 2 f + 4 (K - 1)) |

E depends on the choices: where a row is one document at most min(C - 1, K x chunks of a block - 1), the query's own
block counted. Short documents are cut into small chunks, and their blocks lie on more ranks. Blocks that are copied
under `dispatch` replace more queries than they bring rows; the counts that ranks tell each other come on top.
"""

from __future__ import annotations

from dataclasses import dataclass

EXCHANGES = ("p2p", "all_gather", "a2a", "a2a+p2p", "dispatch")


@dataclass(frozen=True)
class RankSizes:
    """Attention of one tensor- and context-parallel rank.

    Attributes:
        tokens: t, of one context-parallel rank.
        heads, kv_heads, head_size: N, G, D.
        element_bytes: of queries, keys and values.
        block_size, top_k: None for full attention.
    """

    tokens: int
    heads: int
    kv_heads: int
    head_size: int
    element_bytes: int
    block_size: int | None = None
    top_k: int | None = None

    @property
    def score_bytes(self) -> int:
        return max(4, self.element_bytes)


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
    """An exchange, (inner, outer) ranks for `a2a+p2p`, and why."""

    name: str
    levels: tuple[int, int] | None
    reason: str


def head_divisors(context_size: int, sizes: RankSizes) -> list[int]:
    """Numbers of ranks, dividing C, that query and key heads can be traded over."""
    return [
        n for n in range(1, context_size + 1) if not context_size % n and not sizes.heads % n and not sizes.kv_heads % n
    ]


def refusal(exchange: str, sizes: RankSizes, context_size: int, levels: tuple[int, int] | None = None) -> str | None:
    """Why an exchange cannot run with these sizes, with both numbers and what would work; None if it can.

    >>> refusal("a2a", RankSizes(8, 8, 2, 64, 2), 4)
    'exchange a2a: 4 context-parallel ranks do not divide 8 query heads and 2 key heads of a tensor-parallel rank: use \
a context-parallel size of 1 or 2, or the exchange a2a+p2p with [2, 2], or p2p'
    """
    divisors = head_divisors(context_size, sizes)
    possible = " or ".join(str(n) for n in divisors)
    has = f"{sizes.heads} query heads and {sizes.kv_heads} key heads of a tensor-parallel rank"
    if exchange == "a2a" and context_size not in divisors:
        best = divisors[-1]
        mixed = f", or the exchange a2a+p2p with [{best}, {context_size // best}]" if best > 1 else ""
        return (
            f"exchange a2a: {context_size} context-parallel ranks do not divide {has}: use a context-parallel size of "
            f"{possible}{mixed}, or p2p"
        )
    if exchange == "a2a+p2p":
        inner, outer = levels or default_levels(context_size, sizes)
        if inner * outer != context_size:
            return f"exchange a2a+p2p: levels {inner} x {outer} are not the {context_size} context-parallel ranks"
        if inner not in divisors:
            return f"exchange a2a+p2p: {inner} ranks do not divide {has}: use {possible} ranks for a2a"
        if inner == 1 or outer == 1:
            instead = "p2p" if inner == 1 else "a2a"
            return f"exchange a2a+p2p with levels [{inner}, {outer}] is {instead}: use {instead}"
    return None


def default_levels(context_size: int, sizes: RankSizes) -> tuple[int, int]:
    """(ranks that trade heads, shards) of `a2a+p2p`: as many of the first as the heads allow, but not all."""
    inner = max(n for n in head_divisors(context_size, sizes) if n < context_size or context_size == 1)
    return inner, context_size // inner


def traffic(
    exchange: str,
    sizes: RankSizes,
    context_size: int,
    levels: tuple[int, int] | None = None,
    remote_owners: float | None = None,
) -> Traffic:
    """Bytes of keys, queries, outputs and their gradients (without summaries) by the table above.

    Args:
        remote_owners: E for `dispatch`; None: its bound where a row is one document.
    """
    t, e, f = sizes.tokens, sizes.element_bytes, sizes.score_bytes
    q, kv = sizes.heads * sizes.head_size, sizes.kv_heads * sizes.head_size
    others = context_size - 1
    if exchange == "p2p":
        return Traffic(others * t * 2 * kv * e, others * t * 2 * kv * (e + f))
    if exchange == "all_gather":
        return Traffic(others * t * 2 * kv * e, others * t * 4 * kv * e)
    if exchange == "a2a":
        once = others * t * (2 * q + 2 * kv) * e // context_size
        return Traffic(once, once)
    if exchange == "a2a+p2p":
        inner, outer = levels or default_levels(context_size, sizes)
        shard = RankSizes(t * inner, sizes.heads // inner, sizes.kv_heads // inner, sizes.head_size, e)
        both = traffic("a2a", sizes, inner), traffic("p2p", shard, outer)
        return Traffic(sum(one.forward for one in both), sum(one.backward for one in both))
    past = max(0, (sizes.top_k or 1) - 1)
    rows = t * sizes.heads * (most_remote_owners(sizes, context_size) if remote_owners is None else remote_owners)
    forward = rows * (2 * sizes.head_size * e + f + 4 * past)
    return Traffic(int(forward), int(rows * (3 * sizes.head_size * e + 2 * f + 4 * past)))


def most_remote_owners(sizes: RankSizes, context_size: int) -> int:
    """Bound of E where a row is one document: the own and each chosen block may lie on as many ranks as they touch
    chunks of the zigzag layout, and one of them is here."""
    if sizes.block_size is None or sizes.top_k is None:
        return context_size - 1
    chunk = max(1, sizes.tokens // 2)
    chunks = 1 + (sizes.block_size - 1) // chunk + (chunk % sizes.block_size != 0)
    return min(context_size - 1, sizes.top_k * chunks - 1)


def choose_exchange(sizes: RankSizes, context_size: int, levels: tuple[int, int] | None = None) -> ChosenExchange:
    """What `auto` means for these sizes: `a2a` where the heads allow it, otherwise the fewest bytes in a forward and a
    backward pass among the others but `all_gather`, which holds a whole kv head of all ranks in memory and is left to
    those who ask for it.

    Args:
        levels: for `a2a+p2p`, if they are given.

    >>> choose_exchange(RankSizes(16384, 32, 8, 128, 2, 4096, 12), 8).name
    'a2a'
    >>> choose_exchange(RankSizes(32768, 32, 8, 128, 2, 4096, 12), 32).name
    'a2a+p2p'
    >>> choose_exchange(RankSizes(16384, 32, 8, 128, 2, 512, 3), 512).name
    'dispatch'
    """
    if refusal("a2a", sizes, context_size) is None:
        ranks = f"{context_size} context-parallel ranks divide {sizes.heads} query and {sizes.kv_heads} key heads"
        return ChosenExchange("a2a", None, f"{ranks}, {_mebibytes(traffic('a2a', sizes, context_size))}")
    names = ["p2p", "a2a+p2p", "dispatch"] if sizes.block_size is not None else ["p2p", "a2a+p2p"]
    possible = {
        name: traffic(name, sizes, context_size, levels)
        for name in names
        if refusal(name, sizes, context_size, levels) is None
    }
    best = min(possible, key=lambda name: possible[name].total)
    others = ", ".join(f"{name} {_mebibytes(bytes_)}" for name, bytes_ in possible.items() if name != best)
    reason = f"fewest bytes a layer, {_mebibytes(possible[best])}" + (f" against {others}" if others else "")
    return ChosenExchange(best, (levels or default_levels(context_size, sizes)) if best == "a2a+p2p" else None, reason)


def _mebibytes(bytes_: Traffic) -> str:
    return f"{bytes_.forward / 2**20:.4g} + {bytes_.backward / 2**20:.4g} MiB"
