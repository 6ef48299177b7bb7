"""The properties of an exchange before anything is sent: its name, whether it can run, its bytes, its buffers.

Each exchange describes itself so, in the module that carries it out; `exchanges` is the table of all. Sizes are those
of one tensor- and context-parallel rank: t tokens, N query heads, G key heads, D head size, e bytes an element, f bytes
of a score (4, or 8 for fp64), C ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moba_megatron.parallel.exchange import Exchange
from moba_megatron.parallel.wire import Wire

Levels = tuple[int, int]


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

    @property
    def query_width(self) -> int:
        """N D."""
        return self.heads * self.head_size

    @property
    def kv_width(self) -> int:
        """2 G D: a token's keys and values."""
        return 2 * self.kv_heads * self.head_size


@dataclass(frozen=True)
class Message:
    """What the ranks of a group send each other in one layer.

    Attributes:
        forward, backward: bytes received per rank.
        ranks: how many exchange.
        stride: ranks of the context-parallel group from one of them to the next.
        hidden: whether it arrives while the keys at hand are attended; else everybody waits for it.
    """

    forward: int
    backward: int
    ranks: int
    stride: int = 1
    hidden: bool = False


class ExchangeKind:
    """An exchange. What is the same for most of them stands here.

    Attributes:
        name: what users write: megatron-core's `cp_comm_type`, but for `dispatch`.
        between: makes what brings queries and keys of different ranks together, for a group; None where after trading
            heads a rank holds whole packs.
        trades_heads: whether tokens are traded for heads before, within the inner ranks of `levels`.
        two_levels: whether it needs groups of its own for two levels.
        suits_full: whether layers that attend fully may use it.
        in_auto: whether `auto` may take it.
        sends_summaries: whether plans count the bytes of block summaries beside the messages.
        saved_kv: tensors of key heads' width that a layer keeps for its backward pass.
        depends_on_choices: whether its bytes follow from the chosen blocks, so that what sizes tell is a bound.
        host_waits: how often the host waits for the device in a forward pass of a layer; never in a backward pass.
    """

    name: str
    between: Callable[[Wire], Exchange] | None = None
    trades_heads = False
    two_levels = False
    suits_full = True
    in_auto = True
    sends_summaries = True
    saved_kv = 3
    depends_on_choices = False
    host_waits = 0

    def levels(self, context_size: int, sizes: RankSizes, given: Levels | None = None) -> Levels | None:
        """(ranks that trade heads, shards), as given or else as the heads allow; None for an exchange of one level."""
        return None

    def refusal(self, sizes: RankSizes, context_size: int, levels: Levels | None = None) -> str | None:
        """Why it cannot run with these sizes, with both numbers and what would work; None if it can."""
        return None

    def messages(
        self, sizes: RankSizes, context_size: int, levels: Levels | None = None, remote_owners: float | None = None
    ) -> list[Message]:
        """What a rank receives in one layer, without summaries.

        Args:
            levels: (ranks that trade heads, shards); None: `levels`.
            remote_owners: for `dispatch`, how many ranks a query row goes to; None: the bound for one document a row.
        """
        raise NotImplementedError

    def buffers(self, sizes: RankSizes, context_size: int, levels: Levels | None = None) -> int:
        """Bytes that it holds at once in the backward pass of one layer."""
        raise NotImplementedError


def wide_output(sizes: RankSizes) -> int:
    """Bytes of an output that is summed in fp32 or wider: of every exchange in which a rank's queries meet the keys of
    others one after the other."""
    return sizes.tokens * sizes.query_width * sizes.score_bytes


def head_divisors(context_size: int, sizes: RankSizes) -> list[int]:
    """Numbers of ranks, dividing C, that query and key heads can be traded over."""
    return [
        n for n in range(1, context_size + 1) if not context_size % n and not sizes.heads % n and not sizes.kv_heads % n
    ]


def heads_of(sizes: RankSizes) -> str:
    """The heads that ranks must divide, in words."""
    return f"{sizes.heads} query heads and {sizes.kv_heads} key heads of a tensor-parallel rank"
