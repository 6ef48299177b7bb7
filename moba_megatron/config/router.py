"""Combinations of `attention.router` and its settings that cannot work."""

from __future__ import annotations

from collections.abc import Sequence

from moba_megatron.config.attention import AttentionConfig
from moba_megatron.config.model import ModelConfig
from moba_megatron.config.schema import Config
from moba_megatron.config.words import one_of

SHAPE = ("router", "router_dim", "router_heads", "router_keys", "router_norm")
"""Settings that decide which parameters an index has."""
_SETTINGS = (*SHAPE[1:], "router_loss", "router_loss_coeff", "router_init")


def router_checks(config: Config) -> list[tuple[bool, str]]:
    """(wrong, what to say) for each combination."""
    if config.attention.router == "own":
        return [_nothing_to_train(config)]
    return [
        *_dimension_checks(config.attention, config.model),
        *_choice_checks(config),
        *_loss_checks(config),
        *_copy_checks(config.attention, config.model),
    ]


def without_index_checks(attention: AttentionConfig) -> list[tuple[bool, str]]:
    """(wrong, what to say) for each setting of an index where there is none."""
    if attention.router != "own":
        return []
    fields = type(attention).model_fields
    return [
        (
            (value := getattr(attention, name)) != fields[name].default,
            f"attention.{name} = {value} has no effect with attention.router = own: set attention.router: index, or "
            "take it out",
        )
        for name in _SETTINGS
    ]


def index_learns(config: Config, block_size: int, top_k: int) -> bool:
    """Whether a MoBA layer can teach its index anything: some query has two past blocks to compare, among those that
    are chosen (`sparse`) or all (`dense`). One alone has the whole attention, whatever the index says.

    Args:
        block_size: tokens.
        top_k: of the head with most.
    """
    enough = config.attention.router_loss == "dense" or top_k >= 3
    return config.attention.router_loss != "none" and enough and config.data.sequence_length > 2 * block_size


def learning_problems(config: Config, stages: Sequence[Sequence[tuple[int, int] | None]]) -> list[str]:
    """What lets an index learn nothing, a line for each.

    Args:
        stages: for each stage and layer the block size and the largest top_k; None for a full layer.
    """
    attention, length, parts = config.attention, config.data.sequence_length, config.training.train_only
    if attention.router == "own" or attention.router_loss == "none":
        return []
    idle = [
        number
        for number, layers in enumerate(stages, start=1)
        if not any(index_learns(config, *layer) for layer in layers if layer is not None)
    ]
    chooses = "top_k of at least 3 and " if attention.router_loss == "sparse" else ""
    needs = f"{chooses}a block_size below half of data.sequence_length = {length}"
    if len(idle) == len(stages):
        instead = "router_loss: dense or none" if chooses else "router_loss: none"
        return [
            f"attention.router_loss = {attention.router_loss}: an index learns by comparing past blocks, but no MoBA "
            f"layer has two to compare: give one {needs}, or set {instead}"
        ]
    if idle and parts:
        return [
            f"training.train_only = {parts}: nothing learns in stage {one_of(idle)} of attention.stages: give it a "
            f"MoBA layer with {needs}, or leave it to a run without train_only"
        ]
    return []


def _nothing_to_train(config: Config) -> tuple[bool, str]:
    return (
        bool(config.training.train_only),
        f"training.train_only = {config.training.train_only}, but attention.router = own has no weights: set "
        "attention.router: index, or take it out",
    )


def _dimension_checks(attention: AttentionConfig, model: ModelConfig) -> list[tuple[bool, str]]:
    size = attention.router_dim
    if size is None:
        return [(True, "attention.router_dim is not set, but attention.router = index needs it: give one such as 64")]
    rotated = int(size * model.rotary_percent)
    return [
        (size % 2 != 0, f"attention.router_dim = {size}: rotary embedding needs an even one"),
        (
            size % 2 == 0 and (rotated % 2 != 0 or rotated == 0),
            f"attention.router_dim = {size}: model.rotary_percent = {model.rotary_percent} rotates {rotated} of its "
            "channels: it must be an even number above 0",
        ),
        (
            model.rotary_scaling == "longrope" and size != model.head_size,
            f"attention.router_dim = {size}: model.rotary_scaling = longrope has a factor for each pair of channels of "
            f"a head: use {model.head_size}",
        ),
    ]


def _choice_checks(config: Config) -> list[tuple[bool, str]]:
    attention, context = config.attention, config.parallel.context
    selectors, share = attention.selectors, attention.share_selection
    finest = attention.router_heads == "query" and attention.router_keys == "key"
    return [
        (
            "moba" not in attention.kinds,
            f"attention.router = index has no effect with attention.kind = {attention.kind} in every stage: nothing is "
            "chosen. For a warm-up use kind: moba with a top_k of all blocks of the sequence",
        ),
        (
            not selectors <= {"top_k", "threshold"},
            f"attention.router = index scores blocks, but the selector {one_of(sorted(selectors))} looks at no scores: "
            "use top_k or threshold",
        ),
        (
            attention.summary != "mean",
            f"attention.summary = {attention.summary}: attention.router = index scores means of its keys: use mean",
        ),
        (
            attention.backend == "flash_moba",
            "attention.backend = flash_moba chooses by attention's own queries and keys, not by attention.router = "
            "index: use auto",
        ),
        (
            attention.backend == "reference" and context > 1,
            f"attention.backend = reference with attention.router = index and parallel.context = {context}: it needs "
            "the whole pack on one rank: use auto, gathered or triton",
        ),
        (
            share != "none" and not finest,
            f"attention.share_selection = {share} with attention.router_heads = {attention.router_heads} and "
            f"router_keys = {attention.router_keys}: it needs router_heads: query and router_keys: key. router_heads: "
            "key is one choice for each key head already: take share_selection out",
        ),
    ]


def _loss_checks(config: Config) -> list[tuple[bool, str]]:
    attention, parallel, parts = config.attention, config.parallel, config.training.train_only
    return [
        (
            attention.router_loss == "none" and attention.router_loss_coeff != 1.0,
            f"attention.router_loss_coeff = {attention.router_loss_coeff} has no effect with attention.router_loss = "
            "none: take it out",
        ),
        (
            attention.router_loss == "none" and bool(parts),
            f"training.train_only = {parts} with attention.router_loss = none: nothing learns; use sparse or dense",
        ),
        (
            attention.router_loss == "dense" and parallel.context > 1 and parallel.exchange.moba != "a2a",
            f"attention.router_loss = dense with parallel.context = {parallel.context} and parallel.exchange.moba = "
            f"{parallel.exchange.moba}: it runs where a rank has whole sequences: use parallel.exchange: a2a, or "
            "router_loss: sparse",
        ),
    ]


def _copy_checks(attention: AttentionConfig, model: ModelConfig) -> list[tuple[bool, str]]:
    if attention.router_init != "copied":
        return []
    needed = {
        "router_heads": "query",
        "router_keys": "key",
        "router_dim": model.head_size,
        "router_norm": "rms" if model.qk_layernorm else "none",
    }
    start = "attention.router_init = copied"
    return [
        *[
            (
                (value := getattr(attention, name)) != wanted,
                f"{start}: an index like the layer's own queries and keys has {name} = {wanted}, not {value}",
            )
            for name, wanted in needed.items()
        ],
        (model.add_qkv_bias, f"{start}: model.add_qkv_bias = true, but an index has no biases: use drawn"),
        (
            attention.key_convolution is not None,
            f"{start}: attention.key_convolution = {attention.key_convolution}, but keys of an index are not "
            "convolved: use drawn",
        ),
    ]
