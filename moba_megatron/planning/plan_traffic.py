"""Bytes that a rank receives in an optimizer step, by form of parallelism, and how long the step waits for them.

Received by one rank; s = bytes of a microbatch's hidden states on a context-parallel rank, n ranks of the form:

| form | for | bytes |
|---|---|---|
| TP | layer and microbatch: 4 all-reduces | 8 (n - 1)/n s |
| TP with SP | layer and microbatch: 10 gathers and scatters, two of them for the weights' gradients | 10 (n - 1)/n s |
| PP | microbatch and model chunk | 2 s, over the TP ranks with SP |
| CP | layer and microbatch | `parallel.exchanges`, and the summaries, or what an index brings |
| EP | layer with experts and microbatch | `expert_traffic` |
| DP | step, P parameters of a rank that learn | 8 P (n - 1)/n; distributed optimizer: (4 + 2) P (n - 1)/n |

The router and the experts work on the tokens that sequence parallelism leaves a rank, so a layer with experts has half
of TP's transfers, those of attention, and the other half for a shared expert alone. Parameters of experts are reduced
over the ranks that hold the same experts.

Where the index alone learns, TP and CP have their forward part alone, under SP with one gather for attention's output.
Full recomputation repeats the forward part of TP and CP, selective that of CP. A ring and a gather run beside the
attention, but for the launches of each hop; interleaved pipelines run beside everything; all else is waited for.
"""

from __future__ import annotations

from dataclasses import dataclass

from moba_megatron.config import Config
from moba_megatron.model.exchange_choice import ExchangeChoice, rank_sizes
from moba_megatron.model.schedule import LayerAttention
from moba_megatron.parallel.exchanges import EXCHANGES, RouterSizes, router_traffic
from moba_megatron.planning.index_shape import IndexShape
from moba_megatron.planning.plan_machines import LINK_SHARE, Cluster
from moba_megatron.planning.plan_stages import (
    GRADIENT_BYTES,
    Stage,
    config_of_layers,
    expert_replicas,
    repeated_layers,
    tokens_of_rank,
)

# Launches and waiting of one hop of a ring, or of one shard of a gather: an assumption.
HOP_SECONDS = 20e-6


@dataclass(frozen=True)
class Moved:
    """Bytes received by a rank, and the seconds that do not overlap with computation."""

    bytes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.bytes + other.bytes, self.seconds + other.seconds)

    def times(self, count: float) -> Moved:
        """So many of these."""
        return Moved(self.bytes * count, self.seconds * count)


def host_moved(cluster: Cluster, bytes_: int, computing: float) -> Moved:
    """Activations of one layer and microbatch that go to the host and come back: each way overlaps with the computation
    of the layer, a third of which is its forward pass."""
    each_way = bytes_ / (LINK_SHARE * cluster.gpu.host_link)
    return Moved(bytes_, max(0.0, each_way - computing / 3) + max(0.0, each_way - 2 * computing / 3))


def stream_bytes(config: Config) -> int:
    """s of the table."""
    width = 2 if config.training.precision == "bf16" else 4
    return tokens_of_rank(config) * config.model.hidden_size * width


def tensor_moved(config: Config, cluster: Cluster, stage: Stage) -> Moved:
    """TP of one microbatch in one pipeline stage. Embedding and loss cost an all-reduce each, or its two halves."""
    ranks, model = config.parallel.tensor, config.model
    share = (ranks - 1) / ranks * stream_bytes(config)
    learns, sequence = config.training.train_only is None, config.parallel.sequence
    repeated, halves = repeated_layers(config), 0
    # An attention or a feed-forward is half of a layer. What is computed once more brings the forward part again.
    half, of_attention, passes = (4 + sequence, 4 + sequence, 3) if learns else (2, 2 + sequence, 1)
    for number in stage.layers:
        training = config_of_layers(config, number in repeated).training
        halves += of_attention + 2 * (training.passes("attention") - passes)
        if not model.expert_layers[number - 1]:
            halves += half + 2 * (training.passes("mlp") - passes)
        elif model.moe_shared_expert_intermediate_size is not None:
            halves += half + 2 * (max(training.passes("shared_experts"), training.passes("moe")) - passes)
    bytes_ = share * halves + 2 * share * (stage.first + stage.last)
    return Moved(bytes_, bytes_ / cluster.link(1, ranks))


def pipeline_moved(config: Config, cluster: Cluster, data_parallel: int) -> Moved:
    """PP of one microbatch, over all model chunks of a rank; forward and backward."""
    parallel = config.parallel
    if parallel.pipeline == 1:
        return Moved()
    part = stream_bytes(config) / (parallel.tensor if parallel.sequence else 1)
    bytes_ = 2 * part * (parallel.virtual_pipeline or 1)
    stride = parallel.tensor * parallel.context * data_parallel
    hidden = parallel.virtual_pipeline is not None
    return Moved(bytes_, 0.0 if hidden else bytes_ / cluster.link(stride, parallel.pipeline))


def context_moved(
    config: Config, cluster: Cluster, layer: LayerAttention, choice: ExchangeChoice, attention_seconds: float
) -> Moved:
    """CP of one layer and microbatch.

    Args:
        attention_seconds: of this layer on this rank, which hide a ring.
    """
    ranks, stride = config.parallel.context, config.parallel.tensor
    name = choice.full if layer.kind == "full" else choice.moba
    if ranks == 1 or name is None:
        return Moved()
    again, learns = config.training.repeats("core_attn"), config.training.train_only is None
    kind, sizes = EXCHANGES[name], rank_sizes(config, layer)
    choosing = _choosing_bytes(config, layer, name, choice, again)
    moved, seconds = 0.0, 0.0
    for message in kind.messages(sizes, ranks, choice.levels):
        bytes_ = message.forward * (1 + again) + message.backward * learns + choosing
        moved, choosing = moved + bytes_, 0
        apart = stride * message.stride
        if message.hidden:
            waited = max(0.0, bytes_ / cluster.link(apart, message.ranks) - attention_seconds)
            seconds += waited + (1 + learns + again) * (message.ranks - 1) * HOP_SECONDS
        else:
            seconds += cluster.scatter_seconds(bytes_, apart, message.ranks)
    return Moved(moved, seconds)


def _choosing_bytes(config: Config, layer: LayerAttention, exchange: str, choice: ExchangeChoice, again: bool) -> int:
    """What the choice of blocks adds to an exchange: summaries, or all that an index brings.

    Args:
        again: whether the forward pass is made twice; an index learns in the second one alone.
    """
    if layer.kind == "full" or layer.block_size is None:
        return 0
    ranks, sizes = config.parallel.context, rank_sizes(config, layer)
    touched = sizes.tokens // layer.block_size + 2
    index = IndexShape.of(config.attention, config.model, config.parallel.tensor)
    if index is None:
        width = sizes.kv_heads * sizes.head_size * 4
        return EXCHANGES[exchange].sends_summaries * (ranks - 1) * touched * width * (1 + again)
    blocks = -(-sizes.tokens * ranks // layer.block_size)
    passes = [
        router_traffic(
            exchange,
            sizes,
            RouterSizes(index.queries, index.keys, index.size, loss),
            ranks,
            choice.levels,
            touched=touched,
            blocks=blocks,
        )
        for loss in ["none"] * again + [index.loss]
    ]
    return sum(traffic.total for traffic in passes)


def data_moved(config: Config, cluster: Cluster, stage: Stage, data_parallel: int, microbatch_seconds: float) -> Moved:
    """DP of one step: gradients, and with the distributed optimizer weights. Context-parallel ranks hold the
    same weights, so they are among the ranks. Overlapped, gradients hide behind the backward pass of the last
    microbatch, two thirds of its `microbatch_seconds`."""
    parallel = config.parallel
    groups = [(stage.trained - stage.trained_experts, data_parallel * parallel.context, parallel.tensor)]
    if stage.trained_experts:
        stride = parallel.expert * parallel.expert_tensor
        groups.append((stage.trained_experts, expert_replicas(config, data_parallel), stride))
    width = 2 if config.training.precision == "bf16" else 4
    moved = reduced = gathered = 0.0
    for parameters, ranks, stride in groups:
        others = parameters * (ranks - 1) / ranks
        sent = GRADIENT_BYTES[config.training.gradient_precision] * others
        gradients, weights = (sent, width * others) if parallel.distributed_optimizer else (2 * sent, 0.0)
        moved += gradients + weights
        reduced += cluster.reduce_seconds(gradients, stride, ranks)
        gathered += cluster.reduce_seconds(weights, stride, ranks)
    backward = 2 / 3 if config.training.train_only is None else 0.0
    hidden = microbatch_seconds * backward if parallel.overlap_grad_reduce else 0.0
    return Moved(moved, max(0.0, reduced - hidden) + gathered)
