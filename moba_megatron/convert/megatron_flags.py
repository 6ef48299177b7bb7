"""The flags that a checkpoint of Megatron-LM was trained with, and how a model differs from them.

They lie in the checkpoint as a pickled namespace. It is read without running anything of it: classes that it names are
replaced by ones that do nothing, and only plain values are looked at.
"""

from __future__ import annotations

import argparse
import io
from typing import Any

import torch

from moba_megatron.config import ModelConfig


def read_flags(common: bytes) -> dict[str, Any]:
    """The flags within the common part of a checkpoint (`common.pt`, or the entry `common_state`); empty if it has
    none.

    Raises:
        RuntimeError, ValueError: bytes that are no such part.
    """
    names = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(common))
    known = {"argparse.Namespace": argparse.Namespace}
    with torch.serialization.safe_globals([(known.get(name, _inert(name)), name) for name in names]):
        loaded = torch.load(io.BytesIO(common), weights_only=True, map_location="cpu")
    state = loaded[0] if isinstance(loaded, list) else loaded
    flags = state.get("args") if isinstance(state, dict) else None
    return vars(flags) if isinstance(flags, argparse.Namespace) else {}


def differences(flags: dict[str, Any], model: ModelConfig) -> list[str]:
    """Differences between a `model` section and the flags, one line each."""
    heads = flags.get("num_attention_heads")
    theirs = {
        "num_layers": flags.get("num_layers"),
        "hidden_size": flags.get("hidden_size"),
        "num_attention_heads": heads,
        "num_query_groups": flags.get("num_query_groups") if flags.get("group_query_attention") else heads,
        "kv_channels": flags.get("kv_channels"),
        "ffn_hidden_size": flags.get("ffn_hidden_size"),
        "rotary_base": flags.get("rotary_base"),
        "layernorm_epsilon": flags.get("norm_epsilon"),
        "qk_layernorm": flags.get("qk_layernorm"),
        "add_qkv_bias": flags.get("add_qkv_bias"),
        "rotary_percent": flags.get("rotary_percent"),
        "no_rope_freq": _layers_without_rotary(flags.get("no_rope_freq"), model.num_layers),
        "share_embeddings_and_output_weights": _not(flags.get("untie_embeddings_and_output_weights")),
    }
    ours = {
        **{name: getattr(model, name) for name in theirs},
        "no_rope_freq": model.no_rope_freq or [0] * model.num_layers,
        "num_query_groups": model.query_groups,
        "kv_channels": model.head_size,
        "ffn_hidden_size": model.ffn_size,
    }
    found = [
        f"model.{name} = {ours[name]}, but the checkpoint was trained with {value}"
        for name, value in theirs.items()
        if value is not None and value != ours[name]
    ]
    found += _of_experts(flags, model)
    scaled = flags.get("use_rope_scaling")
    if scaled is not None and scaled != (model.rotary_scaling == "llama3"):
        found.append(
            f"model.rotary_scaling = {model.rotary_scaling}, but the checkpoint was trained "
            f"{'with' if scaled else 'without'} --use-rope-scaling (llama3)"
        )
    needed = {
        "normalization": "RMSNorm", "swiglu": True, "position_embedding_type": "rope", "rotary_interleaved": False,
        "add_bias_linear": False,
    }  # fmt: skip
    return found + [
        f"the checkpoint was trained with {name} = {flags[name]}, but our models have {value}"
        for name, value in needed.items()
        if flags.get(name, value) != value
    ]


# Settings of a mixture of experts that its weights do not show; None means none in both formats.
_ROUTING = (
    *("moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax", "moe_router_topk_scaling_factor"),
    *("moe_router_num_groups", "moe_router_group_topk", "moe_expert_capacity_factor"),
)


def _of_experts(flags: dict[str, Any], model: ModelConfig) -> list[str]:
    if model.num_moe_experts is None:
        return []
    return [
        f"model.{name} = {getattr(model, name)}, but the checkpoint was trained with {flags[name]}"
        for name in _ROUTING
        if name in flags and flags[name] != getattr(model, name)
    ]


def _layers_without_rotary(given: int | list[int] | None, layers: int) -> list[int]:
    """Megatron-LM's flag, a list or every how many layers one has none, as a list."""
    if isinstance(given, int):
        given = [int((number + 1) % given == 0) for number in range(layers)] if given else None
    return given or [0] * layers


def _inert(name: str) -> type:
    """A class of this name that takes anything and does nothing."""
    return type(name.rsplit(".", 1)[-1], (), {"__init__": lambda self, *args, **others: None})


def _not(value: Any) -> Any:
    return None if value is None else not value
