"""When full attention is expected to be faster than the MoBA that a configuration asks for, by the kernel model.

Where a document has few more blocks than a query attends, MoBA leaves out few pairs and pays for routing, partial
results and a backward pass of seven products a pair. Nothing is changed: which attention a model has is a question of
the model, and a run may want MoBA at a length where it does not pay, so as to go on at a longer one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moba_megatron.config import Config, ConfigError
from moba_megatron.model.exchange_choice import resolve_exchange
from moba_megatron.model.schedule import FULL, AttentionSchedule, LayerAttention
from moba_megatron.planning.plan_machines import GPUS, Cluster
from moba_megatron.planning.plan_time import layer_seconds

# Less than that is no difference to the model.
LEAST_RATIO = 1.05


@dataclass(frozen=True)
class SlowerThanFull:
    """Layers that would be faster with full attention.

    Attributes:
        layer: how they attend.
        tokens: of a document.
        moba_seconds, full_seconds: expected for one such layer and microbatch on one rank, forward and backward; under
            context parallelism with what their exchanges are waited for.
    """

    layer: LayerAttention
    tokens: int
    moba_seconds: float
    full_seconds: float
    gpu: str
    context: int

    @property
    def ratio(self) -> float:
        return self.moba_seconds / self.full_seconds

    @property
    def line(self) -> str:
        """What the user is told, in one line."""
        sizes, covered = self.layer, self.layer.block_size * self.layer.top_k
        within = f" over {self.context} context-parallel ranks" if self.context > 1 else ""
        return (
            f"({sizes.block_size}, {sizes.blocks}) at {self.tokens:,} tokens{within}: MoBA takes {self.ratio:.1f} x "
            f"the time of full attention on {self.gpu} (estimate: {self.moba_seconds * 1e3:.3g} against "
            f"{self.full_seconds * 1e3:.3g} ms a layer and microbatch, forward and backward); full attention is faster "
            f"there (attention.kind=full), or MoBA with a smaller top_k x block_size than {covered:,} tokens"
        )


def slower_than_full(config: Config, schedule: AttentionSchedule, cluster: Cluster) -> list[SlowerThanFull]:
    """The MoBA settings of a schedule that take longer than full attention; empty where the model has no times.

    Settings whose blocks cover the whole document are full attention and never among them. Documents are as long as
    `data.sequence_length`: of a pack of shorter ones nothing is said.

    Raises:
        ConfigError: an exchange that cannot run with these sizes.
    """
    if config.training.precision != "bf16":
        return []
    tokens, context = config.data.sequence_length, config.parallel.context
    full = _attention_seconds(with_full_exchange(config), FULL, cluster)
    found = []
    for layer in _moba_layers(schedule):
        seconds = _attention_seconds(config, layer, cluster)
        if layer.block_size * layer.fewest_blocks < tokens and seconds > LEAST_RATIO * full:
            found.append(SlowerThanFull(layer, tokens, seconds, full, cluster.gpu.name, context))
    return found


def advice_here(config: Config, schedule: AttentionSchedule, device_name: str, per_node: int) -> list[str]:
    """Lines for the log of a run on a GPU of this name, `per_node` of them in a machine; empty for a GPU, or for an
    exchange of full attention, that no times are known of."""
    gpu = next((gpu for gpu in GPUS.values() if gpu.name in device_name), None)
    if gpu is None:
        return []
    try:
        found = slower_than_full(config, schedule, Cluster(gpu, config.parallel.model_ranks, per_node))
    except ConfigError:  # of the exchange that full attention would have; this run has none
        return []
    return [f"attention: {slow.line}" for slow in found]


def with_full_exchange(config: Config) -> Config:
    """The configuration with full attention in every layer of every stage."""
    attention = config.attention.model_copy(update={"kind": "full", "stages": [], "layers": {}})
    return config.model_copy(update={"attention": attention})


def _moba_layers(schedule: AttentionSchedule) -> Iterable[LayerAttention]:
    layers = (layer for stage in schedule.stages for layer in stage if layer.kind == "moba")
    return dict.fromkeys(layers)


def _attention_seconds(config: Config, layer: LayerAttention, cluster: Cluster) -> float:
    time = layer_seconds(config, layer, cluster, resolve_exchange(config))
    return time.attention + time.context.seconds
