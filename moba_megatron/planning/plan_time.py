"""Seconds of an optimizer step, from operations and bytes.

The time of a microbatch in a pipeline stage: the matrix products of its layers (`MATRIX_SHARE` of the peak, of experts
`EXPERT_SHARE`; three times the forward's, more with recomputation, once where the index alone learns), sorting tokens
by their experts, attention by `kernel_model` (one document as long as the sequence, split evenly over tensor- and
context-parallel ranks; its forward part again where it is recomputed; in a ring the busiest rank of each step counts,
`ring_load`), and what the exchanges make it wait (`plan_traffic`, `expert_traffic`). m microbatches through p stages
take m times the slowest stage; filling and draining (the *bubble*) take each other stage once, or 1/v of that with v
interleaved chunks. Then gradients are reduced, as far as that is not overlapped, and the optimizer passes over its
state.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from moba_megatron.config import Config
from moba_megatron.config.sizes import router_parameters
from moba_megatron.model.exchange_choice import ExchangeChoice, resolve_exchange
from moba_megatron.model.schedule import LayerAttention
from moba_megatron.parallel.exchanges import ring_ranks
from moba_megatron.parallel.ring_load import random_choice_factor
from moba_megatron.planning.expert_shape import ExpertShape
from moba_megatron.planning.expert_traffic import ExpertTraffic, expert_traffic, sorted_bytes
from moba_megatron.planning.index_shape import IndexShape
from moba_megatron.planning.kernel_model import (
    STREAM_SHARE,
    AttentionSizes,
    Machine,
    dense_seconds,
    expected_seconds,
    index_loss_seconds,
)
from moba_megatron.planning.memory_layer import Shape, layer_bytes, offloaded
from moba_megatron.planning.plan_machines import EXPERT_SHARE, MATRIX_SHARE, Cluster
from moba_megatron.planning.plan_stages import (
    Stage,
    config_of_layers,
    expert_replicas,
    feed_forward_parameters,
    index_of_rank,
    layer_parameters,
    repeated_layers,
    stages_of,
    tokens_of_rank,
    vocabulary_rows,
)
from moba_megatron.planning.plan_traffic import (
    Moved,
    context_moved,
    data_moved,
    host_moved,
    pipeline_moved,
    tensor_moved,
)

# Read gradient, main weight and moments, write the last three and the weight; fp32 but for the weight.
OPTIMIZER_BYTES = 30


@dataclass(frozen=True)
class StepTime:
    """One optimizer step.

    Attributes:
        parts: seconds on the slowest stage, by what they are spent on; they add up to `seconds`.
        stages: seconds of one microbatch in each pipeline stage.
        received: bytes that a rank of the slowest stage receives in a step, by form; of those for experts
            `experts_far` come from other nodes.
    """

    parts: dict[str, float]
    stages: tuple[float, ...]
    received: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer and microbatch, forward and backward, without tensor parallelism; or of several layers.

    Attributes:
        sorting: bringing tokens into the order of their experts, and back.
        context, experts: what the layer exchanges.
        host: what it keeps in the memory of the host.
    """

    matrices: float = 0.0
    attention: float = 0.0
    sorting: float = 0.0
    context: Moved = Moved()
    experts: ExpertTraffic = ExpertTraffic()
    host: Moved = Moved()

    def __add__(self, other: LayerTime) -> LayerTime:
        return LayerTime(
            self.matrices + other.matrices,
            self.attention + other.attention,
            self.sorting + other.sorting,
            self.context + other.context,
            self.experts + other.experts,
            self.host + other.host,
        )

    @property
    def computing(self) -> float:
        return self.matrices + self.attention + self.sorting

    @property
    def seconds(self) -> float:
        return self.computing + self.context.seconds + self.experts.seconds + self.host.seconds


@dataclass(frozen=True)
class _StageTime:
    layers: LayerTime
    loss: float
    tensor: Moved
    pipeline: Moved

    @property
    def computing(self) -> float:
        return self.layers.computing + self.loss

    @property
    def seconds(self) -> float:
        return self.layers.seconds + self.loss + self.tensor.seconds + self.pipeline.seconds


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
    gradients = data_moved(config, cluster, stage, data_parallel, one.computing)
    fill = (sum(time.seconds for time in times) - one.seconds) / (parallel.virtual_pipeline or 1)
    layer, has_experts = one.layers, config.model.num_moe_experts is not None
    of_experts = {
        "sorting tokens by expert": microbatches * layer.sorting,
        "expert parallelism": microbatches * layer.experts.seconds,
    }
    for_experts = {"experts": microbatches * layer.experts.bytes, "experts_far": microbatches * layer.experts.far}
    return StepTime(
        parts={
            "matrix products": microbatches * (layer.matrices + one.loss),
            "attention": microbatches * layer.attention,
            **(of_experts if has_experts else {}),
            "tensor parallelism": microbatches * one.tensor.seconds,
            "context parallelism": microbatches * layer.context.seconds,
            **({"offloading": microbatches * layer.host.seconds} if training.offload else {}),
            "pipeline transfers": microbatches * one.pipeline.seconds,
            "pipeline bubble": fill,
            "data parallelism": gradients.seconds,
            "optimizer": _optimizer_seconds(config, stage, data_parallel, cluster),
        },
        stages=tuple(time.seconds for time in times),
        received={
            "tensor": microbatches * one.tensor.bytes,
            "context": microbatches * layer.context.bytes,
            **({"host": microbatches * layer.host.bytes} if training.offload else {}),
            **(for_experts if has_experts else {}),
            "pipeline": microbatches * one.pipeline.bytes,
            "data": gradients.bytes,
        },
    )


def _optimizer_seconds(config: Config, stage: Stage, data_parallel: int, cluster: Cluster) -> float:
    replicas = (data_parallel * config.parallel.context, expert_replicas(config, data_parallel))
    dense, experts = replicas if config.parallel.distributed_optimizer else (1, 1)
    parameters = (stage.trained - stage.trained_experts) / dense + stage.trained_experts / experts
    return parameters * OPTIMIZER_BYTES / (cluster.gpu.machine.bandwidth * STREAM_SHARE)


def layer_seconds(
    config: Config, layer: LayerAttention, cluster: Cluster, exchange: ExchangeChoice, experts: bool = False
) -> LayerTime:
    """One layer and microbatch, forward and backward.

    Args:
        experts: whether its feed-forward is a mixture of experts.
    """
    training, parallel, machine = config.training, config.parallel, cluster.gpu.machine
    sizes = AttentionSizes(
        tokens=config.data.sequence_length,
        heads=config.model.num_attention_heads // parallel.tensor,
        kv_heads=config.model.query_groups // parallel.tensor,
        head_size=config.model.head_size,
        block_size=layer.block_size or 0,
        top_k=layer.top_k or 0,
        budgets=layer.selection.budgets,
        index=IndexShape.of(config.attention, config.model, parallel.tensor) if layer.kind == "moba" else None,
        workspace_bytes=config.attention.workspace_bytes,
    )
    documents = training.micro_batch_size / parallel.context
    learns = training.train_only is None
    attention = _attention_seconds(sizes, machine, training.repeats("core_attn"), learns) * documents
    attention *= _ring_factor(config, layer, exchange)
    time = LayerTime(
        matrices=_matrix_seconds(config, cluster, experts) + _index_seconds(config, cluster, layer),
        attention=attention,
        context=context_moved(config, cluster, layer, exchange, attention),
    )
    name = exchange.full if layer.kind == "full" else exchange.moba
    shape = Shape.of(config, "cuda")
    away = offloaded(training, shape, layer_bytes(shape, layer, name, experts))
    time += LayerTime(host=host_moved(cluster, away.moved, time.computing))
    if not experts:
        return time
    sorting = sorted_bytes(config) / (machine.bandwidth * STREAM_SHARE)
    return time + LayerTime(sorting=sorting, experts=expert_traffic(config, cluster))


def _ring_factor(config: Config, layer: LayerAttention, exchange: ExchangeChoice) -> float:
    """What waiting for the busiest rank in every step of a ring adds to the attention of a MoBA layer."""
    if layer.kind == "full" or exchange.moba is None:
        return 1.0
    ranks = ring_ranks(exchange.moba, config.parallel.context, exchange.levels)
    return random_choice_factor(ranks, config.data.sequence_length / layer.block_size, layer.mean_blocks)


def _matrix_seconds(config: Config, cluster: Cluster, experts: bool) -> float:
    """Matrix products of one layer and microbatch."""
    training, tokens, shape = config.training, tokens_of_rank(config), ExpertShape.of(config)
    feed_forward = feed_forward_parameters(config, experts)
    attention = training.passes("attention") * tokens * (layer_parameters(config, experts) - feed_forward)
    if not experts or shape is None:
        mlp = training.passes("mlp") * tokens * feed_forward
        return 2 * (attention + mlp) / MATRIX_SHARE / cluster.gpu.machine.peak
    of_experts = training.passes("moe")
    of_shared = max(training.passes("shared_experts"), of_experts)
    # A router sees the tokens that sequence parallelism leaves this rank.
    router = router_parameters(config.model)
    whole = of_shared * tokens * (feed_forward - router) + of_experts * shape.tokens * router
    rows = of_experts * shape.rows * 3 * shape.hidden * shape.ffn
    return 2 * ((attention + whole) / MATRIX_SHARE + rows / EXPERT_SHARE) / cluster.gpu.machine.peak


def _index_seconds(config: Config, cluster: Cluster, layer: LayerAttention) -> float:
    """Projections of the index that chooses the blocks of a layer: the hidden states get no gradients from it."""
    if layer.kind == "full":
        return 0.0
    passes = 1 + (config.attention.router_loss != "none") + (config.training.recompute == "full")
    operations = 2 * passes * tokens_of_rank(config) * index_of_rank(config)
    return operations / (cluster.gpu.machine.peak * MATRIX_SHARE)


@functools.cache
def _attention_seconds(sizes: AttentionSizes, machine: Machine, twice: bool, learns: bool) -> float:
    """Forward (twice, if recomputed) and backward over one document; full attention where there is no block size.
    Where the attention learns nothing, its index alone has a backward pass."""
    seconds = expected_seconds if sizes.block_size else dense_seconds
    repeated = seconds(sizes, machine, False) if twice else 0
    return seconds(sizes, machine, learns) + repeated + (0 if learns else index_loss_seconds(sizes, machine))


def loss_seconds(config: Config, vocab_size: int, cluster: Cluster) -> float:
    """The output layer and the loss of one microbatch: logits are made again in the backward pass, if there is one."""
    products = 4 if config.training.train_only is None else 1
    operations = 2 * products * tokens_of_rank(config) * vocabulary_rows(config, vocab_size) * config.model.hidden_size
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
    time, has_experts = LayerTime(), config.model.expert_layers
    repeated = repeated_layers(config)
    kinds = [(layers[number - 1], has_experts[number - 1], number in repeated) for number in stage.layers]
    each = {
        (attention, experts, again): layer_seconds(
            config_of_layers(config, again), attention, cluster, exchange, experts
        )
        for attention, experts, again in set(kinds)
    }
    for kind in kinds:
        time += each[kind]
    return _StageTime(
        layers=time,
        loss=loss_seconds(config, vocab_size, cluster) if stage.last else 0.0,
        tensor=tensor_moved(config, cluster, stage),
        pipeline=pipeline_moved(config, cluster, data_parallel),
    )
