"""Stands for what lives in Megatron-LM and Megatron-Bridge and not in the installed megatron-core: how each asks for a
layer spec, and with what."""

from __future__ import annotations

import inspect
import types
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import ModuleSpec, import_module
from megatron.core.transformer.transformer_config import TransformerConfig

VOCABULARY, LENGTH = 61, 64


def transformer_config(**settings: Any) -> TransformerConfig:
    return TransformerConfig(**model_settings(**settings))


def model_settings(**settings: Any) -> dict[str, Any]:
    return {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 48,
        "normalization": "RMSNorm", "gated_linear_unit": True, "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False, "attention_dropout": 0.0, "hidden_dropout": 0.0, "transformer_impl": "local",
        "masked_softmax_fusion": False, "bias_activation_fusion": False, "init_method_std": 0.2,
        "gradient_accumulation_fusion": False, **settings,
    }  # fmt: skip


@dataclass
class GPTModelConfig:
    """Megatron-LM's from 0.19 on, as far as a layer spec looks: attributes of the transformer are its own as well."""

    transformer: TransformerConfig
    transformer_layer_spec: Any = None
    seq_length: int = LENGTH
    restore_modelopt_state: bool = False

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "transformer"), name)

    def build(self, **where: Any) -> GPTModel:
        """As `GPTModelBuilder.build_model`."""
        return gpt_model(self.transformer, called(self.transformer_layer_spec, self, where.get("vp_stage")), **where)


@dataclass
class Provider(TransformerConfig):
    """Megatron-Bridge's `GPTModelProvider`, as far as a layer spec looks: it is a `TransformerConfig`."""

    transformer_layer_spec: Any = None
    seq_length: int = LENGTH
    use_transformer_engine_full_layer_spec: bool = False

    def provide(self, **where: Any) -> GPTModel:
        spec = called(self.transformer_layer_spec, self, where.get("vp_stage"))
        if self.attention_backend == AttnBackend.local and hasattr(spec, "submodules"):
            replace_core_attention(spec)
        return gpt_model(self, spec, **where)


def called(spec: Any, config: Any, vp_stage: int | None) -> Any:
    """Both call what is not a finished spec, with the model chunk if it asks for it."""
    if isinstance(spec, ModuleSpec):
        return spec
    if "vp_stage" in inspect.signature(spec).parameters:
        return spec(config, vp_stage=vp_stage)
    return spec(config)


def replace_core_attention(spec: ModuleSpec) -> None:
    """What both do for `--attention-backend local`, without a word."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    spec.submodules.self_attention.submodules.core_attention = DotProductAttention


def builder_of_016(config: TransformerConfig, **where: Any) -> GPTModel:
    """Megatron-LM's `gpt_builder` up to 0.18: `--spec` names an object, which nobody calls."""
    return gpt_model(config, import_module(("moba_megatron.megatron", "spec")), **where)


def gpt_model(config: TransformerConfig, spec: Any, **where: Any) -> GPTModel:
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        **where,
    )


class PlainAttention(torch.nn.Module):
    """Stands for a stock core attention: causal, over everything, and without parameters."""

    def __init__(self, config, layer_number, softmax_scale=None, **others):
        super().__init__()
        self.layer_number, self.scale = layer_number, softmax_scale

    def forward(self, query, key, value, *args, **others):
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
        )
        return attended.permute(2, 0, 1, 3).flatten(2)


def megatron_lm_flags(**flags: Any) -> types.ModuleType:
    """Megatron-LM's module of global variables after its flags were parsed."""
    module = types.ModuleType("megatron.training.global_vars")
    module.get_args = lambda: types.SimpleNamespace(**flags)
    return module
