"""Layer specs that read what they need from the model's configuration, the way each caller asks for one."""

from __future__ import annotations

import copy
import functools
import os
from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
from torch import nn

from moba_megatron.config import ConfigError
from moba_megatron.megatron.callers import check_caller, sequence_length, transformer_of
from moba_megatron.megatron.settings import (
    CONFIG_VARIABLE,
    STAGE_VARIABLE,
    Attention,
    AttentionPlan,
    attention_plan,
    plan_of_environment,
    print_once,
)
from moba_megatron.model.schedule import attention_layers
from moba_megatron.model.specs import (
    block_spec,
    core_attention_of,
    layer_specs,
    with_core_attention,
    with_schedule,
)


def layer_spec(
    config: Any, vp_stage: int | None = None, *, attention: Attention | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """The layers of a model, stock but for their core attention.

    Local or Transformer Engine, norms, normalization of queries and keys, and mixtures of experts are as the
    configuration says.

    Args:
        config: Megatron-LM's `GPTModelConfig`, a provider of Megatron-Bridge, or a `TransformerConfig`.
        vp_stage: the model chunk of an interleaved pipeline.
        attention: how layers attend: a YAML file, a dictionary or an `AttentionConfig`. Default: the file that the
            environment variable `MOBA_CONFIG` names.

    Returns:
        one spec for all layers; or, where layers differ (some are mixtures of experts) or sequence parallelism needs
        our final norm (local layers), those of this pipeline stage.

    Raises:
        ConfigError: no settings, settings that cannot work, or something in the caller's settings that does not go
            together with MoBA.
        ValueError: Transformer Engine is asked for and missing.
    """
    transformer = transformer_of(config)
    check_caller(config, transformer)
    kv_heads = transformer.num_query_groups
    plan = attention_plan(attention, transformer.num_layers, sequence_length(config), kv_heads)
    _refuse_settings_without_effect(transformer, plan)
    layers = layer_specs(transformer, plan.schedule, **plan.settings)
    local = transformer.transformer_impl == "local"
    if len(set(map(id, layers))) == 1 and not (local and transformer.sequence_parallel):
        return layers[0]
    return block_spec(transformer, plan.schedule, vp_stage=vp_stage, **plan.settings)


def hybrid_stack_spec(
    pattern: str, *, attention: Attention | None = None, stack_spec: ModuleSpec | None = None
) -> ModuleSpec:
    """A copy of a hybrid model's stack spec whose attention layers (`*`) are MoBA's.

    Args:
        pattern: the model's layers, as in `--hybrid-layer-pattern`. Settings by layer count its attention layers only:
            `last_n_full: 1` is the last `*`.
        attention: as for `layer_spec`.
        stack_spec: default: megatron-core's `hybrid_stack_spec`.

    Raises:
        ConfigError: as for `layer_spec`.
        ValueError: layers of multi-token prediction, or a stack without self-attention.
        ImportError: a megatron-core without `HybridModel` (before 0.18).
    """
    if stack_spec is None:
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as stack_spec
    plan = attention_plan(attention, len(attention_layers(pattern)), sequence_length())
    schedule = plan.schedule.over_pattern(pattern)
    layer = with_schedule(stack_spec.submodules.attention_layer, schedule, **plan.settings)
    stack = copy.copy(stack_spec)
    stack.submodules = copy.copy(stack.submodules)
    checked = functools.partial(_checked_core_attention, core=core_attention_of(layer), pattern=pattern)
    stack.submodules.attention_layer = with_core_attention(layer, checked)
    return stack


def _checked_core_attention(
    *, config: TransformerConfig, layer_number: int, core: Any, pattern: str, **arguments: Any
) -> nn.Module:
    """Build a core attention of a hybrid model; the caller's settings are not known before."""
    check_caller(config, config)
    length = len(pattern.replace("|", ""))
    if config.num_layers != length or layer_number not in attention_layers(pattern):
        raise ConfigError([
            f"layer {layer_number} of {config.num_layers} is an attention layer of the model, but not of the pattern "
            f"{pattern!r} with {length} layers that hybrid_stack_spec was given: give it the model's own"
        ])  # fmt: skip
    return core(config=config, layer_number=layer_number, **arguments)


def _refuse_settings_without_effect(transformer: TransformerConfig, plan: AttentionPlan) -> None:
    """Layers that are full in every stage keep Transformer Engine's attention, which has an exchange of its own."""
    schedule, file = plan.schedule, plan.file
    kept = any(schedule.always_full(number) for number in range(1, schedule.num_layers + 1))
    if transformer.transformer_impl != "transformer_engine" or not kept:
        return
    problems = [
        f"{key} = {value} has no effect in layers that are full in every stage: Transformer Engine computes them. "
        f"Leave it out{instead}"
        for key, value, instead in (
            ("attention.full_backend", file.attention.full_backend, ""),
            ("exchange.full", file.exchange.full, "; their exchange is --cp-comm-type"),
        )
        if value != "auto"
    ]
    if problems:
        raise ConfigError(problems)
    print_once(f"always-full layers: Transformer Engine, cp_comm_type {transformer.cp_comm_type}")


@dataclass
class _CoreAttention:
    core_attention: Any = IdentityOp


@dataclass
class _SelfAttention:
    submodules: _CoreAttention


@dataclass
class _NotBuilt:
    """Stands for the submodules of a layer that is not built yet, as deep as other scripts reach into them."""

    self_attention: _SelfAttention


class MoBATransformerLayer(TransformerLayer):
    """A stock transformer layer that takes its submodules from its configuration when it is built, for callers that
    want a finished spec at import.

    Raises:
        ConfigError: as `layer_spec`; a core attention that a script put into the spec; a layer of multi-token
            prediction.
    """

    def __init__(self, config: TransformerConfig, submodules: _NotBuilt, layer_number: int = 1, *args, **kwargs):
        core = submodules.self_attention.submodules.core_attention
        if core is not IdentityOp:
            raise ConfigError([
                f"the script put {getattr(core, '__name__', core)} in place of MoBA's core attention: leave "
                "--attention-backend out"
            ])  # fmt: skip
        if kwargs.get("is_mtp_layer"):
            raise ConfigError(["layers of multi-token prediction are not supported: leave --mtp-num-layers out"])
        if config.transformer_impl == "local" and config.sequence_parallel:
            raise ConfigError([
                "sequence_parallel = True with local layers: megatron-core's final norm refuses it beside a spec that "
                "is one layer. Use Transformer Engine, or layer_spec where the script calls what --spec names"
            ])  # fmt: skip
        check_caller(config, config)
        said = os.environ.get(CONFIG_VARIABLE), os.environ.get(STAGE_VARIABLE)
        plan = plan_of_environment(*said, config.num_layers, sequence_length(config))
        _refuse_settings_without_effect(config, plan)
        number = layer_number + self._layers_before(config, **kwargs)
        own = layer_specs(config, plan.schedule, **plan.settings)[number - 1]
        if own.module is not TransformerLayer:
            raise ConfigError([
                f"this megatron-core builds such layers as {own.module.__name__}: use layer_spec, which a script from "
                "Megatron-LM 0.19 on calls"
            ])  # fmt: skip
        super().__init__(config, own.submodules, layer_number, *args, **kwargs)

    @staticmethod
    def _layers_before(config, *, vp_stage=None, pg_collection=None, add_layer_offset=True, **_) -> int:
        """Layers on earlier pipeline stages and model chunks."""
        if not add_layer_offset:
            return 0
        stages = getattr(pg_collection, "pp", None)
        pp_rank = parallel_state.get_pipeline_model_parallel_rank() if stages is None else stages.rank()
        return get_transformer_layer_offset(config, vp_stage, pp_rank)


spec = ModuleSpec(module=MoBATransformerLayer, submodules=_NotBuilt(_SelfAttention(_CoreAttention())))
