"""Which exchange the context-parallel ranks of a run use: decided from sizes, before any process starts.

MoBA layers and layers that attend fully may use different ones, so each kind is decided by itself. `auto` is what
`parallel.exchanges.choose_exchange` finds cheapest; a name that cannot run with these sizes is an error; it names one
that can. Full layers have no selected blocks to send queries to, so `dispatch` means `a2a` for them where the heads
allow it, and `p2p` otherwise. The reference backend needs all tokens of its heads, so with it MoBA layers take `a2a`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from moba_megatron.config import Config, ConfigError
from moba_megatron.model.schedule import AttentionSchedule, LayerAttention
from moba_megatron.parallel.exchange_kind import Levels, RankSizes
from moba_megatron.parallel.exchanges import EXCHANGES, ChosenExchange, choose_exchange, refusal, traffic


@dataclass(frozen=True)
class ExchangeChoice:
    """What `parallel.exchange` became."""

    moba: str | None = None
    """Exchange of MoBA layers. None without context parallelism, or without such a layer in any stage."""
    full: str | None = None
    """The same for layers that attend fully."""
    levels: Levels | None = None
    """Ranks of the a2a level and of the p2p level, where a kind uses `a2a+p2p`."""
    lines: tuple[str, ...] = ()
    """For the log: one line a kind, with the reason."""


def resolve_exchange(config: Config) -> ExchangeChoice:
    """The exchanges of a configuration; depends on nothing else.

    Raises:
        ConfigError: an exchange that cannot run with these sizes, naming both numbers and what works.
    """
    if config.parallel.context == 1:
        return ExchangeChoice()
    schedule = AttentionSchedule.from_config(config.attention, config.model.num_layers)
    layers = Counter(layer for stage in schedule.stages for layer in stage)
    choices: dict[str, ChosenExchange] = {}
    problems: list[str] = []
    for kind in ("moba", "full"):
        settings = [layer for layer, _ in layers.most_common() if layer.kind == kind]
        if not settings:
            continue
        try:
            choices[kind] = _resolve_kind(config, kind, settings)
        except ValueError as error:
            problems.append(f"parallel.exchange.{kind} = {getattr(config.parallel.exchange, kind)}: {error}")
    if problems:
        raise ConfigError(problems)
    return ExchangeChoice(
        levels=next((choice.levels for choice in choices.values() if choice.levels), None),
        lines=tuple(
            f"parallel.exchange.{kind} = {getattr(config.parallel.exchange, kind)}: {choice.name}"
            f"{f' {list(choice.levels)}' if choice.levels else ''} ({choice.reason})"
            for kind, choice in choices.items()
        ),
        **{kind: choice.name for kind, choice in choices.items()},
    )


def rank_sizes(config: Config, layer: LayerAttention) -> RankSizes:
    """What one rank holds in one layer and microbatch, without the padding of documents."""
    parallel, model = config.parallel, config.model
    return RankSizes(
        tokens=-(-config.data.sequence_length * config.training.micro_batch_size // parallel.context),
        heads=model.num_attention_heads // parallel.tensor,
        kv_heads=model.query_groups // parallel.tensor,
        head_size=model.head_size,
        element_bytes=2 if config.training.precision == "bf16" else 4,
        block_size=layer.block_size,
        top_k=layer.top_k,
    )


def exchange_of_kind(
    kind: str, wanted: str, sizes: RankSizes, context_size: int, levels: Levels | None, backend: str
) -> ChosenExchange:
    """The exchange of layers of one kind (`moba` or `full`).

    Args:
        wanted: `auto` or a name.
        sizes: what one rank holds.
        levels: ranks of the a2a and of the p2p level. Default: as many on the first as the heads allow.
        backend: what computes MoBA.

    Raises:
        ValueError: `wanted` cannot run with these sizes, or not with this backend.
    """
    if kind == "moba" and backend == "reference":
        if wanted not in ("auto", "a2a"):
            raise ValueError("the reference backend runs under context parallelism with a2a only: use a2a, or gathered")
        choice = _named("a2a", "the only one for the reference backend", sizes, context_size)
    elif wanted == "auto":
        choice = choose_exchange(sizes, context_size, levels)
    elif kind == "full" and not EXCHANGES[wanted].suits_full:
        name = "p2p" if refusal("a2a", sizes, context_size) else "a2a"
        reason = "full layers have no blocks to dispatch to: a2a where the heads allow it, else p2p"
        choice = _named(name, reason, sizes, context_size)
    else:
        chosen = EXCHANGES[wanted].levels(context_size, sizes, levels)
        choice = _named(wanted, "asked for by name", sizes, context_size, chosen)
    if problem := refusal(choice.name, sizes, context_size, choice.levels):
        raise ValueError(problem)
    return choice


def _named(name: str, reason: str, sizes: RankSizes, context_size: int, levels: Levels | None = None) -> ChosenExchange:
    """A choice whose reason ends in the bytes that a rank receives in one layer, forward and backward."""
    found = traffic(name, sizes, context_size, levels)
    bound = "for one document a row at most " if EXCHANGES[name].depends_on_choices else ""
    bytes_ = f"{bound}{found.forward / 2**20:.4g} + {found.backward / 2**20:.4g} MiB a layer"
    return ChosenExchange(name, levels, f"{reason}; {bytes_}")


def _resolve_kind(config: Config, kind: str, settings: list[LayerAttention]) -> ChosenExchange:
    """The exchange of all layers of one kind; `settings` are theirs, the most frequent first."""
    wanted, context = getattr(config.parallel.exchange, kind), config.parallel.context
    given = config.parallel.hierarchical_context
    sizes = [rank_sizes(config, layer) for layer in settings]
    levels = (given[0], given[1]) if given else None
    if wanted == "auto" and levels and (problem := refusal("a2a+p2p", sizes[0], context, levels)):
        raise ValueError(f"parallel.hierarchical_context = {given}: {problem}")
    choice = exchange_of_kind(kind, wanted, sizes[0], context, levels, config.attention.backend)
    for size in sizes[1:]:
        if problem := refusal(choice.name, size, context, choice.levels):
            raise ValueError(problem)
    return choice
