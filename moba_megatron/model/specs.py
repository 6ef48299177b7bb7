"""Layer specs: stock megatron-core layers whose core attention is MoBA.

megatron-core describes a layer by a tree of specs. `moba_layer_spec` copies the path from the layer to its core
attention and puts ours there; everything else, local or Transformer Engine, stays the stock object. `block_spec` does
so for each layer of a schedule and cuts out the layers of one pipeline stage.

Local layers (no Transformer Engine) use our RMSNorm, and our core attention in full layers as well, because the stock
one keeps a matrix of all scores. With Transformer Engine, a layer that is full in every stage keeps its attention, and
so its fused kernels; a layer that is full only in some stages has ours all the time. The Transformer Engine path
follows its documented interface and has not been run on hardware yet.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Literal

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from moba_megatron.model.core_attention import MoBACoreAttention
from moba_megatron.model.key_convolution import ConvolvedKeysSelfAttention
from moba_megatron.model.norm import RMSNorm
from moba_megatron.model.schedule import AttentionSchedule, LayerAttention
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
    top_k: int | None = None,
    kind: Literal["moba", "full"] = "moba",
    backend: str = "auto",
    full_backend: str = "auto",
    exchange: str | Mapping[str, str] = "auto",
    selector: str = "top_k",
    summary: str = "mean",
    threshold: float | None = None,
) -> ModuleSpec:
    """A copy of a stock layer spec with MoBA as its core attention; the original stays as it is.

    Args:
        layer_spec: a transformer layer with self-attention, for instance from `get_gpt_layer_local_spec` or
            `get_gpt_layer_with_transformer_engine_spec`.
        block_size: tokens per block.
        top_k: blocks per query, the current one counted.
        kind: `full` gives plain causal attention through the same module (no block_size, no top_k).
        backend: what computes MoBA, see `moba_attention`.
        full_backend: what computes full attention, see `full_attention`.
        exchange: under context parallelism, how its ranks exchange: `auto`, `p2p`, `all_gather`, `a2a`, `a2a+p2p` or
            `dispatch`; or one of these for each kind, `{"moba": ..., "full": ...}`.
        selector, summary, threshold: how past blocks are chosen, see `moba_attention`.

    Raises:
        ValueError: if the spec has no core attention to replace, or the sizes are impossible.
    """
    attention = LayerAttention(kind, block_size, top_k, Selection(selector, summary, threshold))
    core = functools.partial(
        MoBACoreAttention, attention=attention, backend=backend, full_backend=full_backend, exchange=exchange
    )
    return with_core_attention(layer_spec, core)


def with_core_attention(layer_spec: ModuleSpec, core_attention: object) -> ModuleSpec:
    """A copy of a layer spec that builds its core attention with `core_attention` (a class, a partial or a spec)."""
    self_attention = getattr(layer_spec.submodules, "self_attention", None)
    if not hasattr(getattr(self_attention, "submodules", None), "core_attention"):
        raise ValueError(f"{layer_spec.module} has no submodules.self_attention.submodules.core_attention to replace")
    layer, attention = copy.copy(layer_spec), copy.copy(self_attention)
    layer.submodules, attention.submodules = copy.copy(layer.submodules), copy.copy(attention.submodules)
    layer.submodules.self_attention = attention
    attention.submodules.core_attention = core_attention
    return layer


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


def block_spec(
    config: TransformerConfig,
    schedule: AttentionSchedule,
    *,
    stage: int = 0,
    backend: str = "auto",
    full_backend: str = "auto",
    exchange: str | Mapping[str, str] = "auto",
    key_convolution: int | None = None,
    pp_rank: int = 0,
    vp_stage: int | None = None,
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage, and the final norm, for `GPTModel(transformer_layer_spec=...)`.

    `config.transformer_impl` ("local" or "transformer_engine") chooses the layers around the core attention.

    Args:
        schedule: what every layer of the whole model attends to.
        stage: training stage, counted from 0, that the layers start with.
        backend, full_backend, exchange: as for `moba_layer_spec`.
        key_convolution: width of a convolution of the keys, in every layer; None for none.
        pp_rank, vp_stage: which part of the model; `vp_stage` only with the interleaved schedule.

    Raises:
        ValueError: if the schedule has another number of layers than the model, or Transformer Engine is asked for and
            missing.
    """
    if schedule.num_layers != config.num_layers:
        raise ValueError(f"the schedule has {schedule.num_layers} layers, the model num_layers = {config.num_layers}")
    base, norm = _stock_layer(config)
    if key_convolution is not None:
        base = with_key_convolution(base, key_convolution)
    keep_full = config.transformer_impl == "transformer_engine"
    specs = []
    for number, attention in enumerate(schedule.stages[stage], start=1):
        if keep_full and schedule.always_full(number):
            specs.append(base)
        else:
            core = functools.partial(
                MoBACoreAttention, attention=attention, backend=backend, full_backend=full_backend, exchange=exchange
            )
            specs.append(with_core_attention(base, core))
    first = get_transformer_layer_offset(config, vp_stage, pp_rank)
    count = get_num_layers_to_build(config, vp_stage, pp_rank)
    return TransformerBlockSubmodules(layer_specs=specs[first : first + count], layer_norm=norm)


def _stock_layer(config: TransformerConfig) -> tuple[ModuleSpec, type]:
    """megatron-core's layer spec for this configuration, and the norm that goes with it."""
    if config.transformer_impl == "transformer_engine":
        library = optional_libraries()["transformer_engine"]
        if not library.available:
            raise ValueError(f"transformer_impl = 'transformer_engine', but {library.reason}; {library.how_to_get}")
        from megatron.core.extensions.transformer_engine import TENorm

        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm), TENorm
    if config.transformer_impl != "local":
        raise ValueError(f"transformer_impl = {config.transformer_impl!r}: 'local' or 'transformer_engine'")
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer = with_core_attention(spec, None)
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    if config.qk_layernorm:
        layer.submodules.self_attention.submodules.q_layernorm = RMSNorm
        layer.submodules.self_attention.submodules.k_layernorm = RMSNorm
    return layer, RMSNorm
