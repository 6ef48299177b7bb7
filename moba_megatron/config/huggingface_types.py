"""The valid values of the entries of a Hugging Face `config.json` that are read here: a number in quotes or a list in
the place of a word would otherwise be found late, or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

_MOST = 2**31 - 1


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_positive, value))


def _words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def _switches(value: Any) -> bool:
    return isinstance(value, list) and all(flag in (0, 1) for flag in value)


def _from_zero(value: Any) -> bool:
    return value == 0 and not isinstance(value, bool | float) or _count(value)


def _numbers_of_layers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_from_zero, value))


Check = tuple[Callable[[Any], bool], str]
_COUNT: Check = (_count, f"a whole number from 1 to {_MOST}")
_FROM_ZERO: Check = (_from_zero, f"a whole number from 0 to {_MOST}")
_NOT_NEGATIVE: Check = (lambda value: _number(value) and value >= 0, "a finite number from 0")
_POSITIVE: Check = (_positive, "a finite number above 0")
_NUMBER: Check = (_number, "a finite number")
_FLAG: Check = (lambda value: isinstance(value, bool), "true or false")
_WORD: Check = (lambda value: isinstance(value, str), "a text")
_OBJECT: Check = (lambda value: isinstance(value, dict), "an object")

_TYPES: dict[str, Check] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), _COUNT),
    **dict.fromkeys(("vocab_size", "num_key_value_heads", "head_dim", "max_position_embeddings"), _COUNT),
    "original_max_position_embeddings": _COUNT,
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok", "decoder_sparse_step"), _COUNT),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), _COUNT),
    # Qwen 2 MoE says a window of 0 where it has none.
    **dict.fromkeys(("sliding_window", "max_window_layers"), _FROM_ZERO),
    **dict.fromkeys(("router_aux_loss_coef", "router_jitter_noise"), _NOT_NEGATIVE),
    **dict.fromkeys(("norm_topk_prob", "qkv_bias"), _FLAG),
    "mlp_only_layers": (_numbers_of_layers, "a list of whole numbers from 0"),
    **dict.fromkeys(("rms_norm_eps", "initializer_range", "rope_theta", "partial_rotary_factor"), _POSITIVE),
    **dict.fromkeys(("tie_word_embeddings", "mlp_bias", "attention_bias", "lm_head_bias"), _FLAG),
    "use_sliding_window": _FLAG,
    "no_rope_layer_interval": (lambda value: _number(value) and isinstance(value, int), "a whole number"),
    "no_rope_layers": (_switches, "a list of 0 and 1"),
    **dict.fromkeys(("architectures", "layer_types"), (_words, "a list of texts")),
    **dict.fromkeys(("model_type", "hidden_act"), _WORD),
    **dict.fromkeys(("auto_map", "quantization_config", "rope_scaling", "rope_parameters", "moba_config"), _OBJECT),
}
_ROPE_TYPES: dict[str, Check] = {
    **dict.fromkeys(("type", "rope_type"), _WORD),
    **dict.fromkeys(
        ("factor", "low_freq_factor", "high_freq_factor", "rope_theta", "partial_rotary_factor"), _POSITIVE
    ),
    "original_max_position_embeddings": _COUNT,
    **dict.fromkeys(("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"), _NUMBER),
    "truncate": _FLAG,
    **dict.fromkeys(("short_factor", "long_factor"), (_numbers, "a list of finite numbers above 0")),
}


def wrong_types(values: dict[str, Any]) -> list[str]:
    """Entries with wrong values, one line each. `null` is not an entry."""
    problems = list(_wrong(values, _TYPES))
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(values.get(key), dict):
            problems += _wrong(values[key], _ROPE_TYPES, f"{key}.")
    return problems


def _wrong(values: dict[str, Any], types: dict[str, Check], prefix: str = "") -> Iterator[str]:
    for key, (right, what) in types.items():
        value = values.get(key)
        if value is not None and not right(value):
            shown = repr(value)
            yield f"{prefix}{key} = {shown if len(shown) < 80 else f'{shown[:80]}...'} must be {what}"
