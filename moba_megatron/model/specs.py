"""Layer specs: stock megatron-core layers whose core attention is MoBA.

megatron-core describes a layer by a tree of specs. `with_core_attention` copies the path from the layer to its core
attention and puts another there; everything else, local or Transformer Engine, stays the stock object. One core
attention serves all layers of a schedule (`scheduled_core_attention`): megatron-core builds it with the layer's number,
which counts over all pipeline stages, and that finds the layer in the schedule. So one layer spec is enough wherever a
spec is asked for.

Local layers (no Transformer Engine) use our RMSNorm, and our core attention in full layers as well, because the stock
one keeps a matrix of all scores. With Transformer Engine, a layer that is full in every stage keeps its attention, and
so its fused kernels; a layer that is full only in some stages has ours all the time. The Transformer Engine path
follows its documented interface and has not been run on hardware yet.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import nn

from moba_megatron.model.block_router import (
    IndexedConvolvedKeysSelfAttention,
    IndexedSelfAttention,
    RouterSettings,
)
from moba_megatron.model.core_attention import MoBACoreAttention, MoBASelfAttention
from moba_megatron.model.key_convolution import ConvolvedKeysSelfAttention
from moba_megatron.model.norm import RMSNorm
from moba_megatron.model.schedule import AttentionSchedule, LayerAttention
from moba_megatron.ops.adapters import HALF
from moba_megatron.ops.selection import Selection
from moba_megatron.platform.libraries import optional_libraries

Implementation = Literal["local", "transformer_engine"]


def choose_implementation(device_type: str) -> Implementation:
    """`transformer_engine` on a GPU where it is installed, otherwise `local`."""
    if device_type == "cuda" and optional_libraries()["transformer_engine"].available:
        return "transformer_engine"
    return "local"


def moba_layer_spec(
    layer_spec: ModuleSpec,
    *,
    block_size: int | None = None,
    top_k: int | Sequence[int] | None = None,
    kind: Literal["moba", "full"] = "moba",
    backend: str = "auto",
    full_backend: str = "auto",
    exchange: str | Mapping[str, str] = "auto",
    workspace_bytes: int | None = None,
    selector: str = "top_k",
    summary: str = "mean",
    threshold: float | None = None,
    share_selection: str = "none",
) -> ModuleSpec:
    """A copy of a stock layer spec with MoBA as its core attention; the original stays as it is.

    Args:
        layer_spec: a transformer layer with self-attention, for instance from `get_gpt_layer_local_spec` or
            `get_gpt_layer_with_transformer_engine_spec`.
        block_size: tokens per block.
        top_k: blocks per query, the current one counted; a list has one number for each key head of the whole layer.
        kind: `full` gives plain causal attention through the same module (no block_size, no top_k).
        backend: what computes MoBA, see `moba_attention`.
        full_backend: what computes full attention, see `full_attention`.
        exchange: under context parallelism, how its ranks exchange: `auto`, `p2p`, `all_gather`, `a2a`, `a2a+p2p` or
            `dispatch`; or one of these for each kind, `{"moba": ..., "full": ...}`.
        workspace_bytes: see `moba_attention`.
        selector, summary, threshold, share_selection: how past blocks are chosen, see `moba_attention`.

    Raises:
        ValueError: if the spec has no core attention to replace, or the sizes are impossible.
    """
    selection = Selection(selector, summary, threshold, share_selection)
    most, selection = (None, selection) if top_k is None else selection.with_blocks(top_k)
    attention = LayerAttention(kind, block_size, most, selection)
    core = functools.partial(
        MoBACoreAttention,
        attention=attention,
        backend=backend,
        full_backend=full_backend,
        exchange=exchange,
        workspace_bytes=workspace_bytes,
    )
    return with_core_attention(layer_spec, core)


def with_core_attention(layer_spec: ModuleSpec, core_attention: object) -> ModuleSpec:
    """A copy of a layer spec that builds its core attention with `core_attention` (a class, a partial or a spec)."""
    self_attention = getattr(getattr(layer_spec, "submodules", None), "self_attention", None)
    if not hasattr(getattr(self_attention, "submodules", None), "core_attention"):
        name = getattr(layer_spec, "module", layer_spec)
        raise ValueError(f"{name} has no submodules.self_attention.submodules.core_attention to replace")
    layer, attention = copy.copy(layer_spec), copy.copy(self_attention)
    layer.submodules, attention.submodules = copy.copy(layer.submodules), copy.copy(attention.submodules)
    layer.submodules.self_attention = attention
    attention.submodules.core_attention = core_attention
    return layer


def core_attention_of(layer_spec: ModuleSpec) -> Any:
    """What a layer spec builds its core attention with; None where it has none.

    >>> core_attention_of(ModuleSpec(module=nn.Module)) is None
    True
    """
    self_attention = getattr(getattr(layer_spec, "submodules", None), "self_attention", None)
    return getattr(getattr(self_attention, "submodules", None), "core_attention", None)


def with_schedule(
    layer_spec: ModuleSpec,
    schedule: AttentionSchedule,
    *,
    stage: int = 0,
    backend: str = "auto",
    full_backend: str = "auto",
    exchange: str | Mapping[str, str] = "auto",
    workspace_bytes: int | None = None,
    key_convolution: int | None = None,
) -> ModuleSpec:
    """A copy of a layer spec that serves every layer of a schedule; the original stays as it is.

    Layers that are full in every stage keep the core attention of the spec, unless that is megatron-core's local one
    or, in fp32, Transformer Engine's: both hold the matrix of all scores.

    Args:
        schedule: what every layer of the whole model attends to.
        stage: training stage, counted from 0, that the layers start with; `set_attention_stage` changes it later.
        backend, full_backend, exchange, workspace_bytes: as for `moba_layer_spec`.
        key_convolution: width of a convolution of the keys, in every layer; None for no convolution.

    Raises:
        ValueError: if the spec has no core attention to replace, or another self-attention than megatron-core's whose
            keys should be convolved.
    """
    stock = core_attention_of(layer_spec)
    core = functools.partial(
        scheduled_core_attention,
        schedule=schedule,
        stage=stage,
        full_core=None if stock in (None, DotProductAttention) else stock,
        backend=backend,
        full_backend=full_backend,
        exchange=exchange,
        workspace_bytes=workspace_bytes,
    )
    layer = with_core_attention(layer_spec, core)
    if key_convolution is not None:
        return with_key_convolution(layer, key_convolution)
    if layer.submodules.self_attention.module is SelfAttention:
        layer.submodules.self_attention.module = MoBASelfAttention
    return layer


def scheduled_core_attention(
    *,
    layer_number: int,
    schedule: AttentionSchedule,
    stage: int = 0,
    full_core: Callable[..., nn.Module] | None = None,
    backend: str = "auto",
    full_backend: str = "auto",
    exchange: str | Mapping[str, str] = "auto",
    workspace_bytes: int | None = None,
    **arguments: Any,
) -> nn.Module:
    """Build the core attention of one layer of a schedule.

    Args:
        layer_number: counted from 1 over all pipeline stages, as megatron-core passes it.
        schedule, stage, backend, full_backend, exchange, workspace_bytes: as for `with_schedule`.
        full_core: what builds the core attention of layers that are full in every stage. Default: ours.
        arguments: the others that megatron-core passes to a core attention.

    Raises:
        ValueError: if the schedule has no such layer, or as `MoBACoreAttention`.
    """
    if not 1 <= layer_number <= schedule.num_layers:
        raise ValueError(
            f"layer {layer_number}, but the attention schedule has {schedule.num_layers} layers: layers beyond the "
            "model's own, such as those of multi-token prediction, are not supported"
        )
    of_transformer_engine = getattr(full_core, "__module__", "") == "megatron.core.extensions.transformer_engine"
    if of_transformer_engine and not has_fused_attention(arguments["config"].params_dtype):
        full_core = None
    if full_core is not None and schedule.always_full(layer_number):
        return full_core(layer_number=layer_number, **arguments)
    return MoBACoreAttention(
        layer_number=layer_number,
        attention=schedule.stages[stage][layer_number - 1],
        backend=backend,
        full_backend=full_backend,
        exchange=exchange,
        workspace_bytes=workspace_bytes,
        **arguments,
    )


def has_fused_attention(dtype: torch.dtype) -> bool:
    """Whether Transformer Engine attends in this dtype without the matrix of all scores."""
    return dtype in HALF


def with_key_convolution(layer_spec: ModuleSpec, width: int) -> ModuleSpec:
    """A copy of a layer spec whose keys pass a convolution of this width (`model.key_convolution`), core attention and
    all else kept.

    Raises:
        ValueError: if the spec's self-attention is not megatron-core's.
    """
    self_attention = getattr(layer_spec.submodules, "self_attention", None)
    if getattr(self_attention, "module", None) is not SelfAttention:
        raise ValueError(f"{layer_spec.module} has no stock self-attention whose keys could be convolved")
    layer, attention = copy.copy(layer_spec), copy.copy(self_attention)
    layer.submodules = copy.copy(layer.submodules)
    layer.submodules.self_attention = attention
    attention.module = ConvolvedKeysSelfAttention
    attention.params = {**attention.params, "key_convolution": width}
    return layer


def with_block_router(layer_spec: ModuleSpec, router: RouterSettings) -> ModuleSpec:
    """A copy of a layer spec of ours whose blocks are chosen by an index of its own (`model.block_router`).

    Raises:
        ValueError: if the spec's self-attention is none that can have one.
    """
    kinds = {
        MoBASelfAttention: IndexedSelfAttention,
        ConvolvedKeysSelfAttention: IndexedConvolvedKeysSelfAttention,
    }
    self_attention = getattr(layer_spec.submodules, "self_attention", None)
    if getattr(self_attention, "module", None) not in kinds:
        raise ValueError(f"{layer_spec.module} has no self-attention that could have an index: attention.router = own")
    layer, attention = copy.copy(layer_spec), copy.copy(self_attention)
    layer.submodules = copy.copy(layer.submodules)
    layer.submodules.self_attention = attention
    attention.module = kinds[attention.module]
    attention.params = {**attention.params, "router": router}
    return layer


def block_spec(
    config: TransformerConfig,
    schedule: AttentionSchedule,
    *,
    pp_rank: int | None = None,
    vp_stage: int | None = None,
    **settings: Any,
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage, and the final norm, for `GPTModel(transformer_layer_spec=...)`.

    `config.transformer_impl` ("local" or "transformer_engine") chooses the layers around the core attention.

    Args:
        schedule: what every layer of the whole model attends to.
        pp_rank, vp_stage: which part of the model; `vp_stage` only with the interleaved schedule. Default: this
            process's pipeline rank.
        settings: `stage`, `backend`, `full_backend`, `exchange`, `workspace_bytes` and `key_convolution`, as for
            `with_schedule`; and `router`, an index for every layer that is MoBA in some stage.

    Raises:
        ValueError: if the schedule has another number of layers than the model, or Transformer Engine is asked for and
            missing.
    """
    layers = layer_specs(config, schedule, **settings)
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    return TransformerBlockSubmodules(layer_specs=layers[first : first + count], layer_norm=_final_norm(config))


def layer_specs(
    config: TransformerConfig, schedule: AttentionSchedule, router: RouterSettings | None = None, **settings: Any
) -> list[ModuleSpec]:
    """The spec of every layer of the whole model, the same object for layers that are alike but in how they attend.

    Args and errors as for `block_spec`.
    """
    if schedule.num_layers != config.num_layers:
        raise ValueError(f"the schedule has {schedule.num_layers} layers, the model num_layers = {config.num_layers}")
    experts = _layers_of_experts(config)
    kinds = {kind: with_schedule(_stock_layer(config, experts=kind), schedule, **settings) for kind in set(experts)}
    specs = [kinds[kind] for kind in experts]
    if router is None:
        return specs
    indexed = {kind: with_block_router(spec, router) for kind, spec in kinds.items()}
    choosing = [number for number in range(config.num_layers) if not schedule.always_full(number + 1)]
    if not choosing:
        raise ValueError("attention.router = index, but every layer is full in every stage: nothing is chosen")
    return [indexed[kind] if number in choosing else specs[number] for number, kind in enumerate(experts)]


def _layers_of_experts(config: TransformerConfig) -> list[bool]:
    """Which layers are mixtures of experts, by `moe_layer_freq`: every n-th from the first on, or a list of 0 and 1."""
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    pattern = config.moe_layer_freq
    if isinstance(pattern, int) and pattern > 0:
        return [number % pattern == 0 for number in range(config.num_layers)]
    fits = isinstance(pattern, list) and len(pattern) == config.num_layers and set(pattern) <= {0, 1}
    if not fits:
        raise ValueError(
            f"moe_layer_freq = {pattern!r}: give a number n for every n-th layer, or a list of one 0 (dense) or 1 "
            f"(experts) for each of the {config.num_layers} layers"
        )
    return [bool(entry) for entry in pattern]


def _stock_layer(config: TransformerConfig, *, experts: bool) -> ModuleSpec:
    """megatron-core's layer spec for this configuration; local ones with our RMSNorm where they have one."""
    if config.transformer_impl == "transformer_engine":
        library = optional_libraries()["transformer_engine"]
        if not library.available:
            raise ValueError(f"transformer_impl = 'transformer_engine', but {library.reason}; {library.how_to_get}")
        return _from_config(gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec, config, experts)
    if config.transformer_impl != "local":
        raise ValueError(f"transformer_impl = {config.transformer_impl!r}: 'local' or 'transformer_engine'")
    layer = with_core_attention(_from_config(gpt_layer_specs.get_gpt_layer_local_spec, config, experts), None)
    if config.normalization == "RMSNorm":
        layer.submodules.input_layernorm = RMSNorm
        layer.submodules.pre_mlp_layernorm = RMSNorm
        if config.qk_layernorm and not config.qk_l2_norm:
            layer.submodules.self_attention.submodules.q_layernorm = RMSNorm
            layer.submodules.self_attention.submodules.k_layernorm = RMSNorm
    return layer


def _from_config(make: Callable[..., ModuleSpec], config: TransformerConfig, experts: bool) -> ModuleSpec:
    """Call one of megatron-core's spec functions. Which parameters it has depends on the release; those that the
    configuration has by the same name are taken from there."""
    other_names = {"use_te_op_fuser": "use_transformer_engine_op_fuser"}
    deprecated = {"fp8"}
    arguments = {
        name: getattr(config, other_names.get(name, name))
        for name in inspect.signature(make).parameters
        if name not in deprecated and hasattr(config, other_names.get(name, name))
    }
    arguments["num_experts"] = config.num_moe_experts if experts else None
    if not experts:
        arguments["moe_grouped_gemm"] = False
    return make(**arguments)


def _final_norm(config: TransformerConfig) -> type:
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return RMSNorm if config.normalization == "RMSNorm" else gpt_layer_specs.LNImpl
