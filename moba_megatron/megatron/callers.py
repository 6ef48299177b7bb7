"""Settings that scripts with our specs must not use: checks of the model's configuration and of Megatron-LM's flags.

Settings that the core attention itself refuses (dropout, windows, latent attention, ...) are not repeated here.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from moba_megatron.config import ConfigError
from moba_megatron.megatron.settings import print_once

# What Megatron-Bridge's providers name for layers that are megatron-core's.
_COMMON_LAYERS = (
    "default_layer_spec",
    "transformer_engine_layer_spec",
    "local_layer_spec",
    "get_gpt_decoder_block_spec",
)


def transformer_of(config: Any) -> TransformerConfig:
    """The `TransformerConfig` of what a caller passes: itself (and so a Bridge provider), or the one within a
    `GPTModelConfig` or `HybridModelConfig`.

    Raises:
        ConfigError: for anything else.
    """
    for found in (config, getattr(config, "transformer", None)):
        if isinstance(found, TransformerConfig):
            return found
    raise ConfigError([
        f"{type(config).__name__} has no TransformerConfig: pass a GPTModelConfig, a Megatron-Bridge provider or a "
        "TransformerConfig"
    ])  # fmt: skip


def sequence_length(config: Any = None) -> int | None:
    """Tokens of a sequence, where the caller says. `seq_length` of a `GPTModelConfig` is the longest that positions
    allow (`--max-position-embeddings`), so Megatron-LM's own flag goes before it."""
    flag = getattr(_megatron_lm_flags(), "seq_length", None)
    return getattr(config, "seq_length", None) if flag is None else flag


def check_caller(config: Any, transformer: TransformerConfig) -> None:
    """Check that MoBA's spec supports the caller's settings; print notes on them once.

    Raises:
        ConfigError: naming everything that does not go together with MoBA.
    """
    problems = [text for wrong, text in [*_model_checks(config, transformer), *_flag_checks(transformer)] if wrong]
    if problems:
        raise ConfigError(problems)
    for note in _notes():
        print_once(note)


def _model_checks(config: Any, transformer: TransformerConfig) -> list[tuple[bool, str]]:
    variant = getattr(transformer, "experimental_attention_variant", None)
    return [
        (
            transformer.attention_backend == AttnBackend.local,
            "attention_backend = local puts megatron-core's own attention in place of MoBA: leave --attention-backend "
            "out; what computes MoBA is `backend` of the attention settings",
        ),
        (
            bool(getattr(transformer, "mtp_num_layers", None)),
            f"mtp_num_layers = {getattr(transformer, 'mtp_num_layers', None)}: layers of multi-token prediction are "
            "not supported; leave --mtp-num-layers out",
        ),
        (
            variant is not None,
            f"experimental_attention_variant = {variant} is another attention than MoBA: leave it out",
        ),
        (
            isinstance(transformer, HeterogeneousTransformerConfig),
            "layers that differ in size (--heterogeneous-layers-config-path) are not supported",
        ),
        (
            bool(getattr(config, "restore_modelopt_state", False)),
            "restore_modelopt_state = True (a quantized model) has layers of its own and is not supported",
        ),
        (
            _own_layers(config) is not None,
            f"{type(config).__name__} has layers of its own ({_own_layers(config)}), which MoBA's spec would replace: "
            "this model is not supported",
        ),
        (
            bool(getattr(transformer, "flash_decode", False)),
            "flash_decode = True attends fully, past MoBA: set it to False",
        ),
        (
            any(getattr(transformer, name, False) for name in ("hybrid_context_parallel", "dynamic_context_parallel")),
            "context-parallel groups that differ from sample to sample (--hybrid-context-parallel) are not supported: "
            "leave them out",
        ),
        (
            bool(getattr(config, "use_transformer_engine_full_layer_spec", False)),
            "use_transformer_engine_full_layer_spec = True has no core attention to replace: set it to False",
        ),
    ]


def _own_layers(config: Any) -> str | None:
    """The layer spec that a provider of Megatron-Bridge brings for its model, by name; None for the common layers."""
    field = getattr(type(config), "__dataclass_fields__", {}).get("transformer_layer_spec")
    if field is None:
        return None
    made = field.default_factory is not dataclasses.MISSING
    spec = field.default_factory() if made else field.default
    while isinstance(spec, functools.partial):
        spec = spec.func
    name = getattr(spec, "__name__", None)
    return None if name in (None, *_COMMON_LAYERS) else name


def _flag_checks(transformer: TransformerConfig) -> list[tuple[bool, str]]:
    """What Megatron-LM's flags say, if this is Megatron-LM."""
    flags = _megatron_lm_flags()
    if flags is None:
        return []
    ranks = transformer.context_parallel_size
    return [
        (
            bool(getattr(flags, "create_attention_mask_in_dataloader", False)),
            "MoBA masks causally by itself and takes no mask: add --no-create-attention-mask-in-dataloader",
        ),
        (
            bool(getattr(flags, "reset_attention_mask", False)),
            "--reset-attention-mask acts through a mask, which MoBA does not take: documents would see each other. "
            "Use --dataloader-inter-document-masking (Megatron-LM from 0.19 on), or leave it out",
        ),
        (
            bool(getattr(flags, "dataloader_inter_document_masking", False)) and ranks > 1,
            f"--dataloader-inter-document-masking with --context-parallel-size {ranks} cuts whole samples into zigzag "
            "chunks, while rotary embedding and attention take each document to be cut by itself: wrong positions. "
            "Use one of the two",
        ),
    ]


def _notes() -> list[str]:
    """What is to be said of the caller's settings, one line each."""
    flags = _megatron_lm_flags()
    several = getattr(flags, "overlap_grad_reduce", False) or (
        getattr(flags, "pipeline_model_parallel_size", 1) > 1
        and not getattr(flags, "untie_embeddings_and_output_weights", True)
    )
    if not (getattr(flags, "dist_ckpt_optim_fully_reshardable", False) and several):
        return []
    return [
        "note: --dist-ckpt-optim-fully-reshardable with several gradient buckets (--overlap-grad-reduce, or tied "
        "embeddings under pipeline parallelism) saves optimizer state under the wrong parameters in Megatron-LM up to "
        "0.19 (its pull request 5077)"
    ]


def _megatron_lm_flags() -> Any | None:
    """Megatron-LM's parsed flags; None in another script. They are looked up where it has put them, never imported."""
    for name in ("megatron.training.global_vars", "megatron.training"):
        get_args = getattr(sys.modules.get(name), "get_args", None)
        if get_args is not None:
            try:
                return get_args()
            except AssertionError:  # not parsed yet
                continue
    return None
