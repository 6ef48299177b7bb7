"""Parameters of a model, counted from its settings."""

from __future__ import annotations

from moba_megatron.config.model import ModelConfig


def matrix_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Parameters that multiply every token: projections and feed-forward of all layers, and the output layer."""
    hidden, size = model.hidden_size, model.head_size
    heads, kv_heads = model.num_attention_heads, model.query_groups
    attention = hidden * size * (heads + 2 * kv_heads) + heads * size * hidden
    return model.num_layers * (attention + 3 * hidden * model.ffn_size) + hidden * vocab_size
