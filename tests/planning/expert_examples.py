"""A small mixture of experts for plans, and the model that it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from model_examples import tiny

from moba_megatron import platform
from moba_megatron.config import Config
from moba_megatron.model.builder import build_model
from moba_megatron.model.exchange_choice import resolve_exchange
from moba_megatron.model.schedule import AttentionSchedule

QWEN = Path(__file__).parents[2] / "configs/continued_pretraining/qwen3_30b_a3b/128k_moba.yaml"
MIXTURE: dict[str, Any] = {
    "num_layers": 4,
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 24,
    "moe_layer_freq": [0, 1, 1, 1],
    "moe_shared_expert_intermediate_size": 16,
    "moe_shared_expert_gate": True,
    "moe_aux_loss_coeff": 0.01,
}
WITHOUT_SHARED = {"moe_shared_expert_intermediate_size": None, "moe_shared_expert_gate": False}
VOCABULARY = 62


def mixture(parallel: dict[str, Any] | None = None, training: dict[str, Any] | None = None, **model: Any) -> Config:
    return tiny(
        model={**MIXTURE, "vocab_size": VOCABULARY, **model},
        attention={"last_n_full": 1},
        parallel=parallel or {},
        training={"global_batch_size": 4, **(training or {})},
    )


def schedule_of(config: Config) -> AttentionSchedule:
    return AttentionSchedule.from_config(config.attention, config.model.num_layers)


def built(config: Config) -> list[torch.nn.Module]:
    """The model chunks of this rank."""
    platform.start_model_parallel(config.parallel, resolve_exchange(config).levels)
    return build_model(config, VOCABULARY, schedule_of(config))
