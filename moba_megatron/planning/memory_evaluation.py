"""Memory of a rank that evaluates, from sizes alone: weights, and the dearest moment of a forward pass.

Nothing is kept for a backward pass and there is no optimizer, so one layer is alive at a time: the stream before and
after it, and either attention's tensors or the feed-forward's; on the last pipeline stage the loss comes after all
layers. Each is that of the tokens of one rank, which context parallelism divides; tensor parallelism divides heads,
feed-forward and weights, sequence parallelism the stream.

Not in it: what the process has before a model is built, and the tables of the routing report.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moba_megatron.config import Config
from moba_megatron.model.exchange_choice import resolve_exchange
from moba_megatron.model.schedule import LayerAttention
from moba_megatron.ops.gathered.index import ENTRY_BYTES, default_entries
from moba_megatron.ops.kernel_sizes import default_workspace, forward_entry_bytes
from moba_megatron.planning.memory import BYTES_OF_A_TOKEN
from moba_megatron.planning.memory_layer import Shape, exchange_bytes, layer_bytes
from moba_megatron.planning.plan_stages import stages_of, vocabulary_rows


@dataclass(frozen=True)
class EvaluationMemory:
    """Bytes on the fullest rank: its `weights`, and `working`, the most beside them at any moment."""

    weights: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.working


def evaluation_memory(
    config: Config, layers: tuple[LayerAttention, ...], vocab_size: int, device_type: str
) -> EvaluationMemory:
    """The memory of the losses of one sample a pass.

    Args:
        config: with the layout of the evaluation.
        layers: how each layer attends.
        vocab_size: entries of the vocabulary, without padding.
        device_type: "cuda" or "cpu".
    """
    shape, exchanges = Shape.of(config, device_type), resolve_exchange(config)
    has_experts, found = config.model.expert_layers, []
    for stage in stages_of(config, vocab_size, 1):
        moments = [0]
        for number in stage.layers:
            layer = layers[number - 1]
            exchange = exchanges.full if layer.kind == "full" else exchanges.moba
            bytes_ = layer_bytes(shape, layer, exchange, has_experts[number - 1])
            attention = bytes_.attention + bytes_.selected + _workspace(shape, layer)
            attention += exchange_bytes(config, shape, layer, exchange)
            chunk = config.training.mlp_chunk_size
            mlp = bytes_.mlp if chunk is None else bytes_.mlp * min(chunk, shape.tokens) // shape.tokens
            moments.append(2 * shape.stream + bytes_.norms // 2 + max(attention, mlp))
        if stage.last:
            moments.append(_loss(config, shape, vocab_size))
        working = max(moments) + shape.tokens * BYTES_OF_A_TOKEN
        found.append(EvaluationMemory(stage.parameters * shape.width, working))
    return max(found, key=lambda memory: memory.total)


def _workspace(shape: Shape, layer: LayerAttention) -> int:
    """What the backend keeps of the chosen blocks."""
    if layer.kind == "full":
        return 0
    queries = shape.tokens * shape.heads * shape.head_size
    slots = math.ceil(shape.tokens * shape.heads * (layer.mean_blocks - 1))
    if shape.cuda:
        room = shape.workspace_bytes or default_workspace(queries * shape.width)
        return min(room, slots * forward_entry_bytes(shape.head_size, shape.width))
    entries = min(default_entries(shape.tokens * shape.heads // shape.kv_heads), slots)
    return entries * (shape.head_size * shape.width + ENTRY_BYTES)


def _loss(config: Config, shape: Shape, vocab_size: int) -> int:
    """The final norm, a gathered copy of the hidden states under sequence parallelism, one chunk of logits."""
    rows, hidden = vocabulary_rows(config, vocab_size), shape.tokens * shape.hidden * shape.width
    chunk = min(config.training.tokens_of_loss_chunk("cuda" if shape.cuda else "cpu"), shape.tokens) * rows
    return 2 * shape.stream + hidden * config.parallel.sequence + chunk * (4 + shape.width)
