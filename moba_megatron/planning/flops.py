"""Floating-point operations of training, with attention counted by the pairs that are attended.

Each pair of a query and a key that it attends costs 4 D operations a head forward (two products of size D, two
operations each) and twice that backward. A matrix of P parameters costs 2 P a token forward and 4 P backward; of the
experts of a layer those count that a token is sent to.
Recomputed activations do not count, so *MFU* (model FLOPs utilisation, arXiv 2204.02311) is useful work over the
machine's peak.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moba_megatron.ops.pairs import attended_pairs

if TYPE_CHECKING:
    from moba_megatron.config import Config, ModelConfig

# Dense bf16 operations per second, from the makers' data sheets; matched as a part of the device's name.
PEAK_BF16 = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def matrix_parameters(model: ModelConfig, vocab_size: int) -> int:
    """Parameters that multiply every token: projections and feed-forward of all layers, and the output layer. Of a
    mixture of experts the router, the shared expert and as many others as a token chooses, also where a capacity drops
    some of its choices."""
    hidden, size = model.hidden_size, model.head_size
    heads, kv_heads = model.num_attention_heads, model.query_groups
    attention = hidden * size * (heads + 2 * kv_heads) + heads * size * hidden
    mixtures = sum(model.expert_layers)
    feed_forward = (model.num_layers - mixtures) * 3 * hidden * model.ffn_size
    if mixtures:
        feed_forward += mixtures * (shared_parameters(model) + model.moe_router_topk * expert_parameters(model))
    return model.num_layers * attention + feed_forward + hidden * vocab_size


def shared_parameters(model: ModelConfig) -> int:
    """What every token passes in the feed-forward of a layer with experts: the router and the shared expert."""
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


def training_flops_per_token(config: Config, vocab_size: int, layers: list[tuple[int, int] | None]) -> float:
    """Forward and backward operations for one token of a full-length document.

    Args:
        layers: block size and top-k of each layer, None for a full one.
    """
    length = config.data.sequence_length
    pairs = sum(attended_pairs(length, *(layer or ())) for layer in layers) / length
    attention = 12 * config.model.head_size * config.model.num_attention_heads * pairs
    return 6 * matrix_parameters(config.model, vocab_size) + attention


def peak_flops(device_name: str) -> float | None:
    """The machine's dense bf16 peak in operations per second, None if its name is not in the table."""
    return next((peak for name, peak in PEAK_BF16.items() if name in device_name), None)
