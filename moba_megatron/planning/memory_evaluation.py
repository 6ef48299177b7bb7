"""Memory of a rank that evaluates, from sizes alone: weights, and the dearest moment of a forward pass.

Nothing is kept for a backward pass and there is no optimizer, so one layer is alive at a time: the stream before and
after it, and either attention's tensors or the feed-forward's; on the last pipeline stage the loss comes after all
layers. Each is that of the tokens of one rank, which context parallelism divides; tensor parallelism divides heads,
feed-forward and weights, sequence parallelism the stream.

Not in it: what the process has before a model is built, and the tables of the routing report.
"""

from __future__ import annotations

from dataclasses import dataclass

from moba_megatron.config import Config
from moba_megatron.model.exchange_choice import resolve_exchange
from moba_megatron.model.schedule import LayerAttention
from moba_megatron.planning.memory import BYTES_OF_A_TOKEN, loss_forward_bytes
from moba_megatron.planning.memory_layer import Shape, exchange_bytes, forward_bytes, layer_bytes
from moba_megatron.planning.plan_stages import stages_of


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
            attention, mlp = forward_bytes(config.training, shape, layer, bytes_)
            moments += [attention + exchange_bytes(config, shape, layer, exchange), mlp]
        if stage.last:
            moments.append(loss_forward_bytes(config, shape, vocab_size))
        working = max(moments) + shape.tokens * BYTES_OF_A_TOKEN
        found.append(EvaluationMemory(stage.parameters * shape.width, working))
    return max(found, key=lambda memory: memory.total)
