"""What a Hugging Face `config.json` says, in the words of our `model` section.

Supported are Llama 2, 3, 3.1 and 3.2, Qwen 2 and 2.5, Qwen 3 (dense) and Mistral without a window: decoders of RMSNorm,
SwiGLU and rotary embedding that differ in biases, norms of queries and keys, and rotary scaling. Everything else is
refused by name: a model that is almost right gives plausible text and wrong numbers.

The rotary embedding is said in two dialects: transformers 4 has `rope_theta` and `rope_scaling`, transformers 5
`rope_parameters`. Both are read, and may stand side by side as long as they agree.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moba_megatron.config.checks import ConfigError


@dataclass(frozen=True)
class Family:
    """One kind of model: its class in transformers, and what is there without being said in `config.json`."""

    architecture: str
    defaults: dict[str, Any]
    section: dict[str, Any]
    """What this kind means in our `model` section."""


_COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "initializer_range": 0.02}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", {**_COMMON, "max_position_embeddings": 2048}, {}),
    "mistral": Family(
        "MistralForCausalLM",
        {**_COMMON, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        {},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {**_COMMON, "max_position_embeddings": 32768, "num_key_value_heads": 32},
        {"add_qkv_bias": True},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**_COMMON, "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
        {"qk_layernorm": True},
    ),
}
# null says something here that is not the default of the family.
_MEANINGFUL_NULLS = ("sliding_window", "num_key_value_heads", "head_dim")
_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def read_huggingface_config(folder: str | Path) -> dict[str, Any]:
    """`config.json` of a folder, with the defaults of its family filled in.

    Raises:
        ConfigError: no such file, or a model that is not supported, with one line for each reason.
    """
    path = Path(folder) / "config.json"
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError([f"no config.json in {folder}: it is no Hugging Face model"]) from error
    except ValueError as error:
        raise ConfigError([f"{path} is damaged: {error}"]) from error
    family = FAMILIES.get(given.get("model_type"))
    if family is None:
        raise ConfigError([f"{path}: model_type = {given.get('model_type')!r} is not one of {', '.join(FAMILIES)}"])
    values = {**family.defaults, **{key: value for key, value in given.items() if value is not None}}
    for key in _MEANINGFUL_NULLS:
        if key in given and given[key] is None:
            values.pop(key, None)
    problems = [f"{path}: {key} is missing" for key in _REQUIRED if key not in values]
    problems += [f"{path}: {line}" for line in _unsupported(values, family)]
    if problems:
        raise ConfigError(problems)
    return values


def model_section(values: dict[str, Any]) -> dict[str, Any]:
    """The `model` section of what `read_huggingface_config` gave.

    Raises:
        ConfigError: a rotary embedding that is not supported, or said in two ways that differ.
    """
    heads = values["num_attention_heads"]
    return {
        "num_layers": values["num_hidden_layers"],
        "hidden_size": values["hidden_size"],
        "num_attention_heads": heads,
        "num_query_groups": values.get("num_key_value_heads", heads),
        "kv_channels": values.get("head_dim", values["hidden_size"] // heads),
        "ffn_hidden_size": values["intermediate_size"],
        "vocab_size": values["vocab_size"],
        "max_position_embeddings": values.get("max_position_embeddings"),
        "layernorm_epsilon": values["rms_norm_eps"],
        "init_method_std": values["initializer_range"],
        "share_embeddings_and_output_weights": values["tie_word_embeddings"],
        **FAMILIES[values["model_type"]].section,
        **_rotary_section(values),
    }


def _unsupported(values: dict[str, Any], family: Family) -> list[str]:
    """What of a model cannot be expressed here, one line each."""
    named = values.get("architectures", [family.architecture])
    window = values.get("sliding_window")
    if values["model_type"].startswith("qwen"):
        window = window if values.get("use_sliding_window") else None
    kinds = sorted(set(values.get("layer_types", [])) - {"full_attention"})
    ours = "moba_config" in values
    return [
        text
        for wrong, text in [
            (named != [family.architecture] and not ours, f"architectures = {named} is not {family.architecture}"),
            ("auto_map" in values and not ours, "auto_map asks for code of its own, which is never run"),
            ("quantization_config" in values, "quantization_config: quantized weights are not supported"),
            (values["hidden_act"] != "silu", f"hidden_act = {values['hidden_act']!r}: only silu is supported"),
            (bool(values.get("mlp_bias")), "mlp_bias = true: biases in the feed-forward are not supported"),
            (
                bool(values.get("attention_bias")),
                "attention_bias = true: it adds a bias to the output projection, which is not supported (Qwen 2's "
                "biases on queries, keys and values are)",
            ),
            (window is not None, f"sliding_window = {window}: attention within a window is not supported"),
            (bool(kinds), f"layer_types has {', '.join(kinds)}: only full_attention is supported"),
        ]
        if wrong
    ]


def _rotary_section(values: dict[str, Any]) -> dict[str, Any]:
    rope = _rope(values)
    kind = rope.get("rope_type", "default")
    problems = []
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"partial_rotary_factor = {rope['partial_rotary_factor']}: only whole heads are rotated")
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "longrope": ("short_factor", "long_factor"),
    }
    if kind not in needed:
        problems.append(f"rope_type = {kind!r} is not one of {', '.join(needed)}")
    problems += [f"rope_type = {kind!r} without {key}" for key in needed.get(kind, ()) if rope.get(key) is None]
    if problems:
        raise ConfigError([f"config.json: {line}" for line in problems])
    section: dict[str, Any] = {
        "rotary_base": rope["rope_theta"],
        "rotary_scaling": "none" if kind == "default" else kind,
    }
    original = values.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    original = original or values["max_position_embeddings"]
    if kind in ("linear", "llama3"):
        section["rotary_scaling_factor"] = rope["factor"]
    if kind in ("llama3", "longrope"):
        section["rotary_original_length"] = original
    if kind == "llama3":
        section["rotary_low_freq_factor"] = rope["low_freq_factor"]
        section["rotary_high_freq_factor"] = rope["high_freq_factor"]
    if kind == "longrope":
        section["rotary_short_factors"] = rope["short_factor"]
        section["rotary_long_factors"] = rope["long_factor"]
        section["rotary_attention_factor"] = _longrope_attention_factor(rope, values, original)
    return section


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding from either dialect, in the words of transformers 5."""
    said = []
    for key in ("rope_parameters", "rope_scaling"):
        if values.get(key):
            rope = {"rope_type": values[key].get("type", "default"), **values[key]}
            if any(isinstance(value, dict) for value in rope.values()):
                raise ConfigError([f"config.json: {key} differs from layer to layer, which is not supported"])
            rope.pop("type", None)
            said.append({name: value for name, value in rope.items() if value is not None})
    outside = {name: values[name] for name in ("rope_theta", "partial_rotary_factor") if name in values}
    if outside:
        said.append(outside)
    merged: dict[str, Any] = {}
    for rope in said:
        differing = [name for name in rope if name in merged and merged[name] != rope[name]]
        if differing:
            raise ConfigError(
                [f"config.json says {name} = {merged[name]!r} and = {rope[name]!r}: keep one" for name in differing]
            )
        merged.update(rope)
    return {"rope_theta": 10000.0, **merged}


def _longrope_attention_factor(rope: dict[str, Any], values: dict[str, Any], original: int) -> float:
    """As given, else by the rule of the LongRoPE paper (arXiv 2402.13753) that transformers follows."""
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    factor = rope.get("factor") or values["max_position_embeddings"] / original
    return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
