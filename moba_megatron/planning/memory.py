"""Memory of a rank by part, computed from sizes: what `moba-megatron plan` and `train.py --dry-run` print.

Weights and optimizer (bytes a parameter of this rank): weights 2 in bf16, or 4 in fp32, which are their own main copy;
gradients 4, in fp32; with bf16 weights main weights 4; Adam's two moments 8. The distributed optimizer splits main
weights and moments over the data-parallel and context-parallel ranks, which hold the same weights; those of experts
over the ranks that hold the same experts. Weights that `training.train_only` freezes have the weights alone: neither
megatron-core's gradient buffers nor its optimizer hold them; and what their layers need is that of a forward pass.

Activations are those of `memory_layer`, for all layers of a stage and all microbatches that it holds at once. On top
comes the largest of three moments that never meet: the loss (the final norm; gradients of hidden states and, in fp32,
of the output weight; one chunk's logits and their gradient), the backward pass of a feed-forward, and that of
attention, when the feed-forward's activations of that layer have been freed. A feed-forward of experts needs the most
in its forward pass. With recomputation what one layer makes again is there too.

Not in it: what the process has before a model is built (a CUDA context, NCCL's buffers, on a CPU the libraries), the
allocator's slack, checkpoints on their way to disk.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from moba_megatron.config import Config
from moba_megatron.model.exchange_choice import ExchangeChoice, resolve_exchange
from moba_megatron.model.schedule import AttentionSchedule, LayerAttention
from moba_megatron.planning.memory_layer import (
    LayerBytes,
    Shape,
    attention_backward_bytes,
    exchange_bytes,
    forward_bytes,
    index_bytes,
    layer_bytes,
    mlp_working_bytes,
    offloaded,
    repeated_mlp_bytes,
)
from moba_megatron.planning.plan_stages import (
    GRADIENT_BYTES,
    Stage,
    config_of_layers,
    expert_replicas,
    repeated_layers,
    stages_of,
    vocabulary_rows,
)

# Tokens, labels, positions, mask, targets and per-token numbers of the loss, of each microbatch.
BYTES_OF_A_TOKEN = 64


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on a rank of one pipeline stage.

    Attributes:
        activations: kept between forward and backward, chosen blocks aside.
        moba: log-sum-exps and chosen blocks, kept as well.
        loss, backward, exchange: working memory of the loss, of the dearest backward pass of a layer (or of the way of
            tokens through experts) without and with context parallelism's buffers; only the largest of these moments is
            in the total.
        working: that largest one, or what the reduction of gradients in bf16 needs beyond the room of activations.
    """

    stage: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    moba: int
    loss: int
    backward: int
    exchange: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.moba + self.working


def estimate_memory(
    config: Config, schedule: AttentionSchedule, vocab_size: int, data_parallel: int, device_type: str = "cuda"
) -> list[MemoryEstimate]:
    """The memory of a rank of each pipeline stage, in the dearest stage of the training.

    Args:
        vocab_size: entries of the vocabulary, without padding.
        device_type: "cuda" (layers of Transformer Engine) or "cpu": they keep different tensors.

    Raises:
        ConfigError: an exchange that cannot run with these sizes.
    """
    training = config.training
    microbatches = training.global_batch_size // (training.micro_batch_size * data_parallel)
    shape, exchanges = Shape.of(config, device_type), resolve_exchange(config)
    return [
        _stage_memory(config, schedule, stage, vocab_size, data_parallel, shape, exchanges)
        for stage in stages_of(config, vocab_size, max(1, microbatches))
    ]


def fullest(estimates: list[MemoryEstimate]) -> MemoryEstimate:
    """The stage whose ranks need the most."""
    return max(estimates, key=lambda estimate: estimate.total)


def _stage_memory(
    config: Config,
    schedule: AttentionSchedule,
    stage: Stage,
    vocab_size: int,
    data_parallel: int,
    shape: Shape,
    exchanges: ExchangeChoice,
) -> MemoryEstimate:
    parallel = config.parallel
    state = 12 if config.training.precision == "bf16" else 8
    replicas = (data_parallel * parallel.context, expert_replicas(config, data_parallel))
    dense, experts = replicas if parallel.distributed_optimizer else (1, 1)
    moments = [_stage_activations(config, layers, stage, shape, exchanges) for layers in schedule.stages]
    activations, moba, backward, exchange, freed = max(moments, key=sum)
    loss = _loss_bytes(config, shape, vocab_size) if stage.last else 0
    kept = activations + _edge_bytes(stage, shape)
    # Gradients in bf16 are copied to be summed in fp32, when activations are gone.
    copies = 2 * stage.trained if config.training.gradient_precision == "bf16" else 0
    return MemoryEstimate(
        stage=stage.number,
        weights=stage.parameters * shape.width,
        gradients=stage.trained * GRADIENT_BYTES[config.training.gradient_precision],
        optimizer=(stage.trained - stage.trained_experts) * state // dense + stage.trained_experts * state // experts,
        activations=kept,
        moba=moba,
        loss=loss,
        backward=backward,
        exchange=exchange,
        working=max(loss, backward, backward + exchange - freed, copies - int(kept) - moba),
    )


def _stage_activations(
    config: Config, layers: tuple[LayerAttention, ...], stage: Stage, shape: Shape, exchanges: ExchangeChoice
) -> tuple[int, int, int, int, int]:
    """(activations, MoBA's own, backward, exchange, freed by then) of one stage of the training."""
    if config.training.train_only is not None:
        return _frozen_activations(config, layers, stage, shape, exchanges)
    has_experts, repeated = config.model.expert_layers, repeated_layers(config)
    activations, moba, moments = 0.0, 0.0, [(0, 0, 0)]
    kinds = Counter((layers[number - 1], has_experts[number - 1], number in repeated) for number in stage.layers)
    freed, travelling = 0.0, 0
    # The last layers, which are not repeated, are through when the first ones are computed again.
    for (layer, experts, again), count in sorted(kinds.items(), key=lambda kind: kind[0][2]):
        seen = config_of_layers(config, again)
        training = seen.training
        name = exchanges.full if layer.kind == "full" else exchanges.moba
        bytes_ = layer_bytes(shape, layer, name, experts)
        dropped, made = repeated_mlp_bytes(training, shape, experts)
        kept = bytes_.entry if training.recompute == "full" else bytes_.kept - dropped
        selected = 0 if training.repeats("core_attn") else bytes_.selected
        away = offloaded(training, shape, bytes_)
        travelling = max(travelling, away.kept + away.selected)
        kept, selected = kept - away.kept, selected - away.selected
        activations += count * stage.in_flight * kept
        moba += count * stage.in_flight * selected
        mlp = made + mlp_working_bytes(training, shape, experts)
        moment, *rest = _layer_moment(seen, shape, layer, name, bytes_, mlp, dropped)
        moments.append((moment - int(freed) if again else moment, *rest))
        if not again:
            freed += count * (kept + selected) / (config.parallel.virtual_pipeline or 1)
    # One layer's are on their way out while the next one makes its own; and one layer's come while one is used.
    return int(activations) + 2 * travelling, int(moba), *max(moments, key=lambda moment: moment[0] + moment[1])


def _frozen_activations(
    config: Config, layers: tuple[LayerAttention, ...], stage: Stage, shape: Shape, exchanges: ExchangeChoice
) -> tuple[int, int, int, int, int]:
    """As `_stage_activations`, where the index alone learns."""
    has_experts, repeated = config.model.expert_layers, repeated_layers(config)
    activations, moments = 0.0, [(0, 0, 0)]
    for number in stage.layers:
        layer = layers[number - 1]
        name = exchanges.full if layer.kind == "full" else exchanges.moba
        training, kept = config_of_layers(config, number in repeated).training, index_bytes(shape, layer)
        again = kept if training.recompute == "full" else 0
        activations += stage.in_flight * (shape.stream if training.recompute == "full" else kept)
        attention, mlp = forward_bytes(training, shape, layer, layer_bytes(shape, layer, name, has_experts[number - 1]))
        most = max(attention, mlp)
        moments.append((again + most, exchange_bytes(config, shape, layer, name), most - attention))
    return int(activations), 0, *max(moments, key=lambda moment: moment[0] + moment[1])


def _layer_moment(
    config: Config,
    shape: Shape,
    layer: LayerAttention,
    exchange: str | None,
    bytes_: LayerBytes,
    mlp: int,
    dropped: int,
) -> tuple[int, int, int]:
    """(backward, exchange, what of the former is gone when the exchange begins) of one layer.

    Args:
        mlp: alive in the backward pass of its feed-forward, what is made again for that alone included.
        dropped: of what the feed-forward would keep, not kept.
    """
    again = bytes_.selected if config.training.repeats("core_attn") else 0
    again += bytes_.kept - dropped if config.training.recompute == "full" else 0
    # The feed-forward is through by then, and so is the norm before it.
    attention = attention_backward_bytes(shape, layer) - (bytes_.mlp - dropped) - bytes_.norms // 2
    backward = max(mlp, attention)
    return again + backward, exchange_bytes(config, shape, layer, exchange), backward - attention


def _edge_bytes(stage: Stage, shape: Shape) -> int:
    """Memory that a stage keeps outside its layers: what it received, and the batch."""
    received = 0 if stage.first else stage.in_flight * shape.stream
    return int(received + stage.in_flight * shape.tokens * BYTES_OF_A_TOKEN)


def _loss_bytes(config: Config, shape: Shape, vocab_size: int) -> int:
    """The final norm, and what `model.loss` needs: under sequence parallelism a gathered copy of the hidden states,
    their gradient, the weight's, one chunk of logits."""
    if config.training.train_only is not None:
        return loss_forward_bytes(config, shape, vocab_size)
    rows = vocabulary_rows(config, vocab_size)
    hidden = shape.tokens * shape.hidden * shape.width
    norm = shape.tokens * shape.hidden * (shape.width + (shape.width if shape.cuda else 8)) // shape.norm_split
    weight = rows * shape.hidden * (4 + (shape.width if shape.width == 2 else 0))
    return norm + hidden * (2 if config.parallel.sequence else 1) + weight + _chunk_tokens(config, shape) * rows * 8


def loss_forward_bytes(config: Config, shape: Shape, vocab_size: int) -> int:
    """The same without gradients: the final norm, under sequence parallelism a gathered copy of the hidden states, one
    chunk of logits."""
    rows, hidden = vocabulary_rows(config, vocab_size), shape.tokens * shape.hidden * shape.width
    logits = _chunk_tokens(config, shape) * rows * (4 + shape.width)
    return 2 * shape.stream + hidden * config.parallel.sequence + logits


def _chunk_tokens(config: Config, shape: Shape) -> int:
    return min(config.training.tokens_of_loss_chunk("cuda" if shape.cuda else "cpu"), shape.tokens)
