"""Bytes that a rank receives in an optimizer step, by form of parallelism, and how long the step waits for them.

Received by one rank; s = bytes of a microbatch's hidden states on a context-parallel rank, n ranks of the form:

| form | for | bytes |
|---|---|---|
| TP | layer and microbatch: 4 all-reduces | 8 (n - 1)/n s |
| TP with SP | layer and microbatch: 10 gathers and scatters, two of them for the weights' gradients | 10 (n - 1)/n s |
| PP | microbatch and model chunk | 2 s, over the TP ranks with SP |
| CP | layer and microbatch | `parallel.traffic`, and the summaries |
| DP | step, P parameters of a rank | 8 P (n - 1)/n; distributed optimizer: (4 + 2) P (n - 1)/n |

Full recomputation repeats the forward part of TP and CP, selective that of CP. A ring and a gather run beside the
attention, but for the launches of each hop; interleaved pipelines run beside everything; all else is waited for.
"""

from __future__ import annotations

from dataclasses import dataclass

from moba_megatron.config import Config
from moba_megatron.model.exchange import ExchangeChoice, rank_sizes
from moba_megatron.model.schedule import LayerAttention
from moba_megatron.parallel.traffic import default_levels, traffic
from moba_megatron.planning.plan_machines import Cluster
from moba_megatron.planning.plan_stages import Stage, tokens_of_rank

# Launches and waiting of one hop of a ring, or of one shard of a gather: an assumption.
HOP_SECONDS = 20e-6


@dataclass(frozen=True)
class Moved:
    """Bytes received by a rank, and the seconds that nothing else hides."""

    bytes: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Moved) -> Moved:
        return Moved(self.bytes + other.bytes, self.seconds + other.seconds)

    def times(self, count: float) -> Moved:
        """So many of these."""
        return Moved(self.bytes * count, self.seconds * count)


def stream_bytes(config: Config) -> int:
    """s of the table."""
    width = 2 if config.training.precision == "bf16" else 4
    return tokens_of_rank(config) * config.model.hidden_size * width


def tensor_moved(config: Config, cluster: Cluster, stage: Stage) -> Moved:
    """TP of one microbatch in one pipeline stage. Embedding and loss cost an all-reduce each, or its two halves."""
    ranks = config.parallel.tensor
    share = (ranks - 1) / ranks * stream_bytes(config)
    again = config.training.recompute == "full"
    layer = (10 + 4 * again) * share if config.parallel.sequence else (8 + 4 * again) * share
    bytes_ = layer * len(stage.layers) + 2 * share * (stage.first + stage.last)
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
    again = config.training.recompute != "none"
    sizes = rank_sizes(config, layer)
    if name == "a2a+p2p":
        inner, outer = choice.levels or default_levels(ranks, sizes)
        one = traffic("a2a", sizes, inner)
        whole = traffic(name, sizes, ranks, (inner, outer))
        traded = one.total + again * one.forward
        ring = whole.total + again * whole.forward - traded
        seconds = cluster.scatter_seconds(traded, stride, inner)
        waited = max(0.0, ring / cluster.link(stride * inner, outer) - attention_seconds)
        return Moved(traded + ring, seconds + waited + (2 + again) * (outer - 1) * HOP_SECONDS)
    found = traffic(name, sizes, ranks)
    bytes_ = found.total + again * found.forward
    if name == "a2a":
        return Moved(bytes_, cluster.scatter_seconds(bytes_, stride, ranks))
    if layer.kind == "moba":
        blocks = sizes.tokens // layer.block_size + 2
        summaries = (ranks - 1) * blocks * sizes.kv_heads * sizes.head_size * 4 * (1 + again)
        bytes_ += summaries
    if name == "dispatch":
        return Moved(bytes_, cluster.scatter_seconds(bytes_, stride, ranks))
    waited = max(0.0, bytes_ / cluster.link(stride, ranks) - attention_seconds)
    return Moved(bytes_, waited + (2 + again) * (ranks - 1) * HOP_SECONDS)


def data_moved(
    config: Config, cluster: Cluster, stage: Stage, data_parallel: int, microbatch_seconds: float
) -> Moved:
    """DP of one step: gradients in fp32, and with the distributed optimizer weights. Context-parallel ranks hold the
    same weights, so they are among the ranks. Overlapped, gradients hide behind the backward pass of the last
    microbatch, two thirds of its `microbatch_seconds`."""
    parallel = config.parallel
    ranks = data_parallel * parallel.context
    width = 2 if config.training.precision == "bf16" else 4
    others = stage.parameters * (ranks - 1) / ranks
    gradients, weights = (4 * others, width * others) if parallel.distributed_optimizer else (8 * others, 0.0)
    reduced, gathered = (cluster.reduce_seconds(bytes_, parallel.tensor, ranks) for bytes_ in (gradients, weights))
    hidden = microbatch_seconds * 2 / 3 if parallel.overlap_grad_reduce else 0.0
    return Moved(gradients + weights, max(0.0, reduced - hidden) + gathered)
