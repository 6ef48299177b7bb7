"""Which part of a Hugging Face tensor is which part of a parameter of a mixture of experts.

- The router is one row for each expert, whole on every rank; so is the gate of the shared expert.
- An expert is a feed-forward layer (`mapping`): gate over up, and down. A rank has some of the experts whole, or its
  part of each. In files each has three tensors; transformers 5 holds all experts of a layer in two, gate over up
  [experts, 2 x width, hidden] and down [experts, hidden, width].
- The shared expert is split as a dense layer is.

The bias of balanced routers is a parameter of checkpoints, and of no Hugging Face model here.
"""

from __future__ import annotations

import re
from dataclasses import replace

from moba_megatron.config import ModelConfig
from moba_megatron.convert.piece import Arrangement, Piece, columns, gate_and_up

ROUTER, BIAS = "mlp.router.weight", "mlp.router.expert_bias"
SHARED_GATE = "mlp.shared_experts.gate_weight"
_SHARED, _EXPERT = "mlp.shared_experts.", "mlp.experts.local_experts."
_OF_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight")


def expert_name(number: int, part: str) -> str:
    """The rest of the canonical name of an expert's parameter.

    >>> expert_name(3, "linear_fc1")
    'mlp.experts.local_experts.3.linear_fc1.weight'
    """
    return f"{_EXPERT}{number}.{part}.weight"


def number_of_expert(rest: str) -> tuple[int, str] | None:
    """Which expert such a name is of, and its part; None for other names."""
    found = _OF_EXPERT.fullmatch(rest)
    return (int(found[1]), found[2]) if found else None


def expert_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The parameters of a layer with experts that replace the feed-forward layer, by the rest of their canonical
    names."""
    if model.num_moe_experts is None:
        return {}
    hidden, width, shared = model.hidden_size, model.expert_ffn_size, model.moe_shared_expert_intermediate_size
    shapes: dict[str, tuple[int, ...]] = {ROUTER: (model.num_moe_experts, hidden)}
    if model.moe_router_enable_expert_bias:
        shapes[BIAS] = (model.num_moe_experts,)
    for number in range(model.num_moe_experts):
        shapes[expert_name(number, "linear_fc1")] = (2 * width, hidden)
        shapes[expert_name(number, "linear_fc2")] = (hidden, width)
    if shared is not None:
        shapes[f"{_SHARED}linear_fc1.weight"] = (2 * shared, hidden)
        shapes[f"{_SHARED}linear_fc2.weight"] = (hidden, shared)
        if model.moe_shared_expert_gate:
            shapes[SHARED_GATE] = (1, hidden)
    return shapes


def is_expert(name: str) -> bool:
    """Whether a parameter is one of a routed expert, which other ranks split than the rest of the model."""
    return _EXPERT in name


def expert_pieces(
    prefix: str, rest: str, model: ModelConfig, rank: int, ranks: int, arrangement: Arrangement
) -> list[Piece]:
    """As `mapping.pieces`, of what `expert_shapes` names; nothing for other parameters.

    Args:
        prefix: of the layer's tensors.
        rest: of the canonical name, after the layer.
    """
    block, shared = f"{prefix}{arrangement.mixture}.", f"{prefix}mlp.shared_expert."
    if rest == ROUTER:
        return [Piece(f"{block}gate.weight")]
    if rest == SHARED_GATE:
        return [Piece(f"{prefix}mlp.shared_expert_gate.weight")]
    if rest.startswith(_SHARED):
        size = model.moe_shared_expert_intermediate_size or 0
        if rest.endswith("linear_fc1.weight"):
            return list(gate_and_up(shared, size, rank, ranks))
        return [columns(f"{shared}down_proj.weight", model.hidden_size, size // ranks, rank)]
    if found := number_of_expert(rest):
        return _of_expert(f"{block}experts.", *found, model, rank, ranks, arrangement.parts)
    return []


def _of_expert(
    prefix: str, number: int, part: str, model: ModelConfig, rank: int, ranks: int, parts: tuple[str, str, str] | None
) -> list[Piece]:
    width = model.expert_ffn_size
    if parts is not None:
        own = f"{prefix}{number}."
        if part == "linear_fc1":
            return list(gate_and_up(own, width, rank, ranks, names=parts[:2]))
        return [columns(f"{own}{parts[2]}.weight", model.hidden_size, width // ranks, rank)]
    if part == "linear_fc1":
        found = list(gate_and_up(prefix, width, rank, ranks, fused=True))
    else:
        found = [columns(f"{prefix}down_proj.weight", model.hidden_size, width // ranks, rank)]
    return [
        replace(piece, source=piece.source.removesuffix(".weight"), there=(number, *piece.there)) for piece in found
    ]
