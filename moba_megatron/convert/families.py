"""Our model as a plain model of transformers: the contents of an exported `config.json`.

The family is the one that the model came from (`model.export_as`), or the first one with the same computation. Biases
on queries, keys and values make it a Qwen 2, norms of queries and keys a Qwen 3, channels without rotation a Phi-3,
layers without rotation a SmolLM3. Without these it is a Llama. transformers refuses a Llama whose heads do not divide
the width; then it is a Mistral without a window, the same computation. A mixture of experts is a Mixtral, with norms of
queries and keys a Qwen 3 MoE, with a shared expert a Qwen 2 MoE. `config.families` has the differences between
families.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeVar

import torch

from moba_megatron.config import ConfigError, ModelConfig
from moba_megatron.config.expert_families import unwritten
from moba_megatron.config.families import FAMILIES, families_of, family_checks
from moba_megatron.config.family import MARKS
from moba_megatron.convert.indexes import Indexes
from moba_megatron.convert.written_rope import written_positions, written_rope
from moba_megatron.hf.settings import MoBASettings
from moba_megatron.model.schedule import LayerAttention

T = TypeVar("T")
_TAKES_ITSELF = "exports and generation need one; moba-megatron evaluate reads the checkpoint"
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def family_of(model: ModelConfig) -> str:
    """The `model_type` of an export: `model.export_as`, or the first that computes this model.

    Raises:
        ConfigError: no plain one does, or not the one that is asked for.
    """
    computing = families_of(model)
    if not computing:
        raise ConfigError([f"{line}; {_TAKES_ITSELF}" for line in refusals(model)])
    if wrong := [text for refused, text in family_checks(model) if refused]:
        raise ConfigError(wrong)
    return model.export_as or computing[0]


def refusals(model: ModelConfig) -> list[str]:
    """Why no plain model of transformers computes this one, one line each."""
    if model.num_moe_experts is None:
        said = [f"model.{key} = {getattr(model, key)}" for key, plain in MARKS.items() if getattr(model, key) != plain]
        return [
            f"no plain model of transformers has {' and '.join(said)}, with heads of {model.head_size} in a width of "
            f"{model.hidden_size}"
        ]
    if lines := unwritten(model):
        return lines
    refused = [
        f"{family.architecture} not {family.refuses(model)}" for family in FAMILIES.values() if family.has_experts
    ]
    return [f"no mixture of experts in transformers computes this model: {', '.join(refused)}"]


def huggingface_config(
    model: ModelConfig, *, length: int, dtype: torch.dtype, moba: dict[str, Any] | None, special_ids: dict[str, int]
) -> dict[str, Any]:
    """What `config.json` says.

    Args:
        model: with `vocab_size` set.
        length: tokens that it can take, written as `max_position_embeddings`; with yarn no less than it reaches.
        dtype: of the weights.
        moba: what `moba_config` gave; None: full attention.
        special_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`, those that exist.

    Raises:
        ConfigError: no plain model of transformers computes this one.
    """
    family = family_of(model)
    length = written_positions(model, length, FAMILIES[family])
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
        **FAMILIES[family].written(model),
        **written_rope(model, length, FAMILIES[family]),
    }
    # Named here, a load without the package that registers "moba" fails in transformers 5, instead of attending fully.
    # transformers 4 ignores the name; the one it would heed forbids any other choice, even an outspoken one.
    return values if moba is None else {**values, "attn_implementation": "moba", "moba_config": moba}


def moba_config(
    layers: tuple[LayerAttention, ...],
    decode: str,
    key_convolution: int | None = None,
    indexes: Indexes | None = None,
) -> dict[str, Any] | None:
    """The entry `moba_config` for the layers of a model; None if all layers use full attention without convolved keys.

    Args:
        decode: how new tokens attend to a cache, `full` or `moba`.
        key_convolution: width of the filters of keys, which full layers have as well.
        indexes: those that choose the blocks of MoBA layers.
    """
    sparse = {number: layer for number, layer in enumerate(layers) if layer.kind == "moba"}
    kinds = tuple(layer.kind for layer in layers)
    if not sparse:
        # No layer has blocks; the entry tells of the filters.
        full = MoBASettings(1, 1, kinds, decode, key_convolution=key_convolution)
        return full.to_config() if key_convolution else None
    size, sizes = _most({number: (layer.block_size, layer.top_k) for number, layer in sparse.items()})
    selection, selections = _most({number: layer.selection for number, layer in sparse.items()})
    index = indexes.settings if indexes else None
    return MoBASettings(*size, kinds, decode, sizes, selection, selections, key_convolution, index).to_config()


def _most(values: dict[int, T]) -> tuple[T, dict[int, T]]:
    """What most layers have (of several as many, the first), and what the others have."""
    most, _ = Counter(values.values()).most_common(1)[0]
    return most, {number: value for number, value in values.items() if value != most}
