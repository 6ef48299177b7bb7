"""Parameters of a model, counted from its settings. Of a mixture of experts those are *active* that a token passes."""

from __future__ import annotations

from moba_megatron.config.model import ModelConfig


def matrix_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Parameters that multiply every token: projections and feed-forward of all layers, and the output layer. In a
    mixture of experts: the router, the shared expert and the experts that a token chooses, even if a capacity drops
    some of them."""
    hidden, size = model.hidden_size, model.head_size
    heads, kv_heads = model.num_attention_heads, model.query_groups
    attention = hidden * size * (heads + 2 * kv_heads) + heads * size * hidden
    mixtures = sum(model.expert_layers)
    feed_forward = (model.num_layers - mixtures) * 3 * hidden * model.ffn_size
    if mixtures:
        feed_forward += mixtures * (shared_parameters(model) + model.moe_router_topk * expert_parameters(model))
    return model.num_layers * attention + feed_forward + hidden * vocab_size


def shared_parameters(model: ModelConfig) -> int:
    """Parameters that process every token in the feed-forward of a layer with experts: the router and the shared
    expert."""
    return router_parameters(model) + 3 * model.hidden_size * (model.moe_shared_expert_intermediate_size or 0)


def router_parameters(model: ModelConfig) -> int:
    """Parameters of one router, with the gate of the shared expert."""
    return model.hidden_size * ((model.num_moe_experts or 0) + model.moe_shared_expert_gate)


def expert_parameters(model: ModelConfig) -> int:
    """Parameters of one expert of one layer."""
    return 3 * model.hidden_size * model.expert_ffn_size


def idle_parameters(model: ModelConfig) -> int:
    """Parameters that a token does not pass: experts that it does not choose. All others are the *active* ones; 0 for
    a dense model."""
    experts = (model.num_moe_experts or 0) - model.moe_router_topk
    return sum(model.expert_layers) * experts * expert_parameters(model)
