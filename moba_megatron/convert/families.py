"""Our model as a plain model of transformers: the contents of an exported `config.json`.

The kind follows from what the model has: biases on queries, keys and values make it a Qwen 2, norms of queries and keys
a Qwen 3, neither a Llama (or, where the heads do not divide the width, which transformers refuses for Llama, a Mistral
without a window: the same computation). The rotary embedding is written in both dialects, and with both places of the
original length, because transformers 4 reads base 10000, silently, where only the words of transformers 5 are there.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, TypeVar

import torch

from moba_megatron.config import ConfigError, ModelConfig
from moba_megatron.config.huggingface import FAMILIES
from moba_megatron.hf.settings import MoBASettings
from moba_megatron.model.rotary import rotary_frequencies
from moba_megatron.model.schedule import LayerAttention

T = TypeVar("T")
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_EXTRAS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False, "sliding_window": None},
    "qwen3": {"attention_bias": False, "use_sliding_window": False, "sliding_window": None},
}


def family_of(model: ModelConfig) -> str:
    """The `model_type` that computes this model.

    Raises:
        ConfigError: no plain one does.
    """
    if model.add_qkv_bias and model.qk_layernorm:
        raise ConfigError([
            "model.add_qkv_bias and model.qk_layernorm together: no plain model of transformers has biases on queries, "
            "keys and values and norms of queries and keys"
        ])  # fmt: skip
    if model.add_qkv_bias:
        return "qwen2"
    if model.qk_layernorm:
        return "qwen3"
    return "llama" if model.hidden_size % model.num_attention_heads == 0 else "mistral"


def huggingface_config(
    model: ModelConfig, *, length: int, dtype: torch.dtype, moba: dict[str, Any] | None, special_ids: dict[str, int]
) -> dict[str, Any]:
    """What `config.json` says.

    Args:
        model: with `vocab_size` set.
        length: tokens that it can take, written as `max_position_embeddings`.
        dtype: of the weights.
        moba: what `moba_config` gave; None: full attention.
        special_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`, those that exist.

    Raises:
        ConfigError: no plain model of transformers computes this one.
    """
    family = family_of(model)
    values = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": model.layernorm_epsilon,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": model.share_embeddings_and_output_weights,
        "max_position_embeddings": length,
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": _DTYPES[dtype],
        "torch_dtype": _DTYPES[dtype],
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **special_ids},
        **_EXTRAS[family],
        **_rope(model, length),
    }
    # Named here, a load without the package that registers "moba" fails in transformers 5, instead of attending fully.
    # transformers 4 ignores the name; the one it would heed forbids any other choice, even an outspoken one.
    return values if moba is None else {**values, "attn_implementation": "moba", "moba_config": moba}


def moba_config(
    layers: tuple[LayerAttention, ...], decode: str, key_convolution: int | None = None
) -> dict[str, Any] | None:
    """The entry `moba_config` for the layers of a model; None if all of them attend fully, to keys as they are.

    Args:
        decode: how new tokens attend to a cache, `full` or `moba`.
        key_convolution: width of the filters of keys, which full layers have as well.
    """
    sparse = {number: layer for number, layer in enumerate(layers) if layer.kind == "moba"}
    kinds = tuple(layer.kind for layer in layers)
    if not sparse:
        # No layer has blocks; the entry tells of the filters.
        full = MoBASettings(1, 1, kinds, decode, key_convolution=key_convolution)
        return full.to_config() if key_convolution else None
    size, sizes = _most({number: (layer.block_size, layer.top_k) for number, layer in sparse.items()})
    selection, selections = _most({number: layer.selection for number, layer in sparse.items()})
    return MoBASettings(*size, kinds, decode, sizes, selection, selections, key_convolution).to_config()


def _most(values: dict[int, T]) -> tuple[T, dict[int, T]]:
    """What most layers have (of several as many, the first), and what the others have."""
    most, _ = Counter(values.values()).most_common(1)[0]
    return most, {number: value for number, value in values.items() if value != most}


def _rope(model: ModelConfig, length: int) -> dict[str, Any]:
    """The rotary embedding in the words of transformers 4 and 5."""
    scaling = _scaling(model, length)
    both = {
        "rope_theta": model.rotary_base,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": model.rotary_base, **(scaling or {"rope_type": "default"})},
    }
    if scaling is None or scaling["rope_type"] != "longrope":
        return both
    return {**both, "original_max_position_embeddings": model.rotary_original_length}


def _scaling(model: ModelConfig, length: int) -> dict[str, Any] | None:
    original = {"original_max_position_embeddings": model.rotary_original_length}
    longrope = {
        "rope_type": "longrope",
        "attention_factor": model.rotary_attention_factor,
        # Without effect beside attention_factor, but transformers warns where it is missing.
        "factor": max(1.0, length / model.rotary_original_length),
        **original,
    }
    if model.rotary_interpolation != 1.0:
        # Interpolated positions on top of another scaling have no name of their own; longrope can say any frequencies.
        frequencies = rotary_frequencies(model)
        short, long = _longrope_factors(model, frequencies.short), _longrope_factors(model, frequencies.long)
        return {**longrope, "short_factor": short, "long_factor": long}
    if model.rotary_scaling == "linear":
        return {"rope_type": "linear", "factor": model.rotary_scaling_factor}
    if model.rotary_scaling == "llama3":
        return {
            "rope_type": "llama3",
            "factor": model.rotary_scaling_factor,
            "low_freq_factor": model.rotary_low_freq_factor,
            "high_freq_factor": model.rotary_high_freq_factor,
            **original,
        }
    if model.rotary_scaling == "longrope":
        return {**longrope, "short_factor": model.rotary_short_factors, "long_factor": model.rotary_long_factors}
    return None


def _longrope_factors(model: ModelConfig, frequencies: torch.Tensor) -> list[float]:
    """Factors f with 1 / (f x base^(i / D)) = frequency in fp32, which is how they will be used.

    The nearest fp32 number may miss the frequency by its last place, which at position 100,000 is a visible angle; one
    of its neighbours mostly meets it.
    """
    exponents = torch.arange(0, model.head_size, 2, dtype=torch.int64).float() / model.head_size
    powers = model.rotary_base**exponents
    up = down = (1.0 / (frequencies.double() * powers.double())).float()
    candidates = [up]
    for _ in range(3):
        up, down = torch.nextafter(up, torch.tensor(math.inf)), torch.nextafter(down, torch.tensor(0.0))
        candidates += [up, down]
    tried = torch.stack(candidates)
    misses = (1.0 / (tried * powers) - frequencies).abs()
    return tried.gather(0, misses.argmin(0, keepdim=True))[0].tolist()
