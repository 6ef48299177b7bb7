"""Seconds of an optimizer step, from operations and bytes.

What a microbatch takes in a pipeline stage: the matrix products of its layers (`MATRIX_SHARE` of the peak; three times
the forward's, four with full recomputation), attention by `kernel_model` (one document as long as the sequence, split
evenly over tensor- and context-parallel ranks; its forward part again under any recomputation), and what the exchanges
make it wait (`plan_traffic`). m microbatches through p stages take m times the slowest stage; filling and draining (the
*bubble*) take each other stage once, or 1/v of that with v interleaved chunks. Then gradients are reduced, as far as
that is not overlapped, and the optimizer passes over its state.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from moba_megatron.config import Config
from moba_megatron.model.exchange_choice import ExchangeChoice, resolve_exchange
from moba_megatron.model.schedule import LayerAttention
from moba_megatron.planning.kernel_model import STREAM_SHARE, AttentionSizes, Machine, dense_seconds, expected_seconds
from moba_megatron.planning.plan_machines import MATRIX_SHARE, Cluster
from moba_megatron.planning.plan_stages import Stage, layer_parameters, stages_of, tokens_of_rank, vocabulary_rows
from moba_megatron.planning.plan_traffic import Moved, context_moved, data_moved, pipeline_moved, tensor_moved

# Read gradient, main weight and moments, write the last three and the weight; fp32 but for the weight.
OPTIMIZER_BYTES = 30


@dataclass(frozen=True)
class StepTime:
    """One optimizer step.

    Attributes:
        parts: seconds on the slowest stage, by what they are spent on; they add up to `seconds`.
        stages: seconds of one microbatch in each pipeline stage.
        received: bytes that a rank of the slowest stage receives in a step, by form.
    """

    parts: dict[str, float]
    stages: tuple[float, ...]
    received: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class _StageTime:
    matrices: float
    attention: float
    tensor: Moved
    context: Moved
    pipeline: Moved

    @property
    def seconds(self) -> float:
        moved = self.tensor.seconds + self.context.seconds + self.pipeline.seconds
        return self.matrices + self.attention + moved


def step_time(
    config: Config, layers: tuple[LayerAttention, ...], vocab_size: int, data_parallel: int, cluster: Cluster
) -> StepTime:
    """The time of a step in which layer n attends as `layers[n - 1]`.

    Raises:
        ConfigError: an exchange that cannot run with these sizes.
    """
    training, parallel = config.training, config.parallel
    microbatches = training.global_batch_size // (training.micro_batch_size * data_parallel)
    stages, exchange = stages_of(config, vocab_size, microbatches), resolve_exchange(config)
    times = [_stage_time(config, layers, stage, vocab_size, data_parallel, cluster, exchange) for stage in stages]
    slowest = max(range(len(stages)), key=lambda number: times[number].seconds)
    one, stage = times[slowest], stages[slowest]
    gradients = data_moved(config, cluster, stage, data_parallel, one.matrices + one.attention)
    replicas = data_parallel * parallel.context if parallel.distributed_optimizer else 1
    optimizer = stage.parameters * OPTIMIZER_BYTES / replicas / (cluster.gpu.machine.bandwidth * STREAM_SHARE)
    fill = (sum(time.seconds for time in times) - one.seconds) / (parallel.virtual_pipeline or 1)
    return StepTime(
        parts={
            "matrix products": microbatches * one.matrices,
            "attention": microbatches * one.attention,
            "tensor parallelism": microbatches * one.tensor.seconds,
            "context parallelism": microbatches * one.context.seconds,
            "pipeline transfers": microbatches * one.pipeline.seconds,
            "pipeline bubble": fill,
            "data parallelism": gradients.seconds,
            "optimizer": optimizer,
        },
        stages=tuple(time.seconds for time in times),
        received={
            "tensor": microbatches * one.tensor.bytes,
            "context": microbatches * one.context.bytes,
            "pipeline": microbatches * one.pipeline.bytes,
            "data": gradients.bytes,
        },
    )


def layer_seconds(
    config: Config, layer: LayerAttention, cluster: Cluster, exchange: ExchangeChoice
) -> tuple[float, float, Moved]:
    """(matrix products, attention, context parallelism) of one layer and microbatch, forward and backward."""
    training, parallel = config.training, config.parallel
    passes = 4 if training.recompute == "full" else 3
    operations = 2 * passes * tokens_of_rank(config) * layer_parameters(config)
    matrices = operations / (cluster.gpu.machine.peak * MATRIX_SHARE)
    sizes = AttentionSizes(
        tokens=config.data.sequence_length,
        heads=config.model.num_attention_heads // parallel.tensor,
        kv_heads=config.model.query_groups // parallel.tensor,
        head_size=config.model.head_size,
        block_size=layer.block_size or 0,
        top_k=layer.top_k or 0,
    )
    documents = training.micro_batch_size / parallel.context
    attention = _attention_seconds(sizes, cluster.gpu.machine, training.recompute != "none") * documents
    return matrices, attention, context_moved(config, cluster, layer, exchange, attention)


@functools.cache
def _attention_seconds(sizes: AttentionSizes, machine: Machine, twice: bool) -> float:
    """Forward (twice, if recomputed) and backward over one document; full attention where there is no block size."""
    seconds = expected_seconds if sizes.block_size else dense_seconds
    return seconds(sizes, machine, True) + (seconds(sizes, machine, False) if twice else 0)


def loss_seconds(config: Config, vocab_size: int, cluster: Cluster) -> float:
    """The output layer and the loss of one microbatch: logits are made again in the backward pass."""
    operations = 8 * tokens_of_rank(config) * vocabulary_rows(config, vocab_size) * config.model.hidden_size
    return operations / (cluster.gpu.machine.peak * MATRIX_SHARE)


def _stage_time(
    config: Config,
    layers: tuple[LayerAttention, ...],
    stage: Stage,
    vocab_size: int,
    data_parallel: int,
    cluster: Cluster,
    exchange: ExchangeChoice,
) -> _StageTime:
    matrices, attention, context = 0.0, 0.0, Moved()
    for number in stage.layers:
        products, attended, moved = layer_seconds(config, layers[number - 1], cluster, exchange)
        matrices, attention, context = matrices + products, attention + attended, context + moved
    if stage.last:
        matrices += loss_seconds(config, vocab_size, cluster)
    return _StageTime(
        matrices,
        attention,
        tensor_moved(config, cluster, stage),
        context,
        pipeline_moved(config, cluster, data_parallel),
    )
