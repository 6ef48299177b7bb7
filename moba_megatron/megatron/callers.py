"""What the scripts that use our specs must not ask for: found in the model's configuration and in Megatron-LM's flags.

What the core attention itself refuses (dropout, windows, latent attention, ...) is not repeated here.
"""

from __future__ import annotations

import sys
from typing import Any

from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from moba_megatron.config import ConfigError


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


def sequence_length(config: Any) -> int | None:
    """Tokens of a sequence, where the caller says."""
    found = getattr(config, "seq_length", None)
    if found is None:
        found = getattr(_megatron_lm_flags(), "seq_length", None)
    return found


def refuse_what_does_not_fit(config: Any, transformer: TransformerConfig) -> None:
    """Raise a `ConfigError` that names everything in the caller's settings that MoBA's spec cannot serve."""
    problems = [text for wrong, text in [*_model_checks(config, transformer), *_flag_checks(transformer)] if wrong]
    if problems:
        raise ConfigError(problems)


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
            bool(getattr(config, "use_transformer_engine_full_layer_spec", False)),
            "use_transformer_engine_full_layer_spec = True has no core attention to replace: set it to False",
        ),
    ]


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
        (
            bool(getattr(flags, "hybrid_context_parallel", False)),
            "--hybrid-context-parallel (groups that differ from sample to sample) is not supported: leave it out",
        ),
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
