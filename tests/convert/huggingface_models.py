"""Tiny models of every supported kind, made by transformers itself, and the logits that transformers gives for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

VOCABULARY = 99
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
ORIGINAL = 32
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 4.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 5.0,
    "original_max_position_embeddings": ORIGINAL,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 4.5],
    "original_max_position_embeddings": ORIGINAL,
    "factor": 4.0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
    # Of four pairs of channels, one is kept, one is divided, and two are blended.
    "beta_fast": 4.0,
    "beta_slow": 0.05,
}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
MIXTURES: dict[str, tuple[type, dict[str, Any]]] = {
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "intermediate_size": 48}),
    # Weights of all experts that are chosen, and a dense layer in the middle.
    "qwen3-moe": (Qwen3MoeConfig, {**EXPERTS, "head_dim": 12, "mlp_only_layers": [1]}),
    "qwen3-moe-normalised": (
        Qwen3MoeConfig,
        {**EXPERTS, "norm_topk_prob": True, "tie_word_embeddings": True, "rope_parameters": YARN},
    ),
    # Two layers with experts, one of which is chosen.
    "qwen2-moe": (
        Qwen2MoeConfig,
        {**EXPERTS, "num_experts_per_tok": 1, "decoder_sparse_step": 2, "shared_expert_intermediate_size": 80},
    ),
}
MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama-one-key-head-each": (LlamaConfig, {"num_key_value_heads": 8, "tie_word_embeddings": True}),
    "llama-linear": (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama-3.1": (LlamaConfig, {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5}),
    "llama-longrope": (LlamaConfig, {"rope_parameters": LONGROPE}),
    "llama-wide-heads": (LlamaConfig, {"head_dim": 24}),
    "mistral": (MistralConfig, {"sliding_window": None, "hidden_size": 60, "head_dim": 10}),
    "qwen2": (Qwen2Config, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-tied": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-yarn": (Qwen2Config, {"rope_parameters": YARN}),
    "qwen3": (Qwen3Config, {"head_dim": 12}),
    "qwen3-yarn": (
        Qwen3Config,
        {"rope_parameters": {**YARN, "truncate": False, "mscale": 0.7, "mscale_all_dim": 1.3}, "head_dim": 16},
    ),
    "qwen3-tied": (Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "phi3": (Phi3Config, {**IDS, "tie_word_embeddings": True}),
    # Three of four pairs of channels are rotated, and the attention factor is theirs alone.
    "phi3-partial-longrope": (
        Phi3Config,
        {
            **IDS,
            "original_max_position_embeddings": ORIGINAL,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.3],
                "long_factor": [1.0, 2.0, 4.5],
            },
        },
    ),
    "smollm3": (SmolLM3Config, {**IDS, "no_rope_layer_interval": 2, "rms_norm_eps": 1e-5}),
    # The layers without rotary embedding go without the attention factor.
    "smollm3-yarn": (
        SmolLM3Config,
        {**IDS, "no_rope_layers": [1, 0, 0, 1], "rope_parameters": YARN, "tie_word_embeddings": False},
    ),
    **MIXTURES,
}


@dataclass
class Saved:
    """A saved model and its logits [1, tokens, vocabulary] for texts shorter and longer than the original length."""

    folder: Path
    texts: list[torch.Tensor]
    logits: list[torch.Tensor]


def save_model(folder: Path, config: Any, max_shard_size: str = "60KB", dtype: torch.dtype = torch.float32) -> Any:
    """A model with random weights; norms and biases, which start as ones and zeros, are random as well."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * (0.2 if "norm" in name else 0.5))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


@torch.no_grad()
def saved_model(folder: Path, name: str) -> Saved:
    kind, changes = MODELS[name]
    model = save_model(folder, kind(**{**SIZES, **changes}))
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, VOCABULARY, (1, length), generator=generator) for length in (ORIGINAL - 4, 96)]
    return Saved(folder, texts, [model(ids).logits for ids in texts])
