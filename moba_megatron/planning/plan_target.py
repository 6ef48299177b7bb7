"""What is planned: a configuration, or a Hugging Face folder without one, on so many GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moba_megatron.config import Config, ConfigError, check_world, load_config
from moba_megatron.config.lengths import parse_length
from moba_megatron.model.schedule import checked_schedule
from moba_megatron.planning.memory import estimate_memory, fullest
from moba_megatron.planning.plan_layouts import suggest_layouts
from moba_megatron.planning.plan_machines import GPUS, MEMORY_SHARE, Cluster
from moba_megatron.planning.plan_model import config_of_model
from moba_megatron.planning.run_plan import check_precision, vocabulary_size

_MOST = 4096


@dataclass(frozen=True)
class Target:
    """A configuration with a layout, the cluster for it, and what was chosen for the user, one line each."""

    config: Config
    cluster: Cluster
    notes: tuple[str, ...] = ()


def planned(
    path: Path, overrides: list[str] | None, length: str | None, *, gpu: str, count: int | None, per_node: int
) -> Target:
    """The arguments of the command.

    Args:
        path: a YAML configuration, or a Hugging Face folder.
        length: tokens of a sample, for a folder.
        gpu: a name out of `GPUS`.
        count: GPUs; None: the fewest, in whole nodes, that hold the layout.

    Raises:
        ValueError: a folder without a length, a length for a configuration, an unknown GPU, or a configuration that
            cannot be used.
    """
    if gpu.lower() not in GPUS:
        raise ConfigError([f"--gpu {gpu}: choose one of {', '.join(GPUS)}"])
    kind = GPUS[gpu.lower()]
    if path.is_dir():
        if length is None:
            raise ConfigError([f"{path} is a folder: give a length with --length, for instance --length 128K"])
        config = config_of_model(path, parse_length("--length", length), overrides)
        counts = [count] if count else [per_node * 2**power for power in range(10) if per_node * 2**power <= _MOST]
        return _with_best_layout(config, [Cluster(kind, number, per_node) for number in counts])
    if length is not None:
        raise ConfigError([f"--length {length} is for a Hugging Face folder: give data.sequence_length=N for {path}"])
    config = load_config(path, overrides)
    if count is not None:
        return Target(config, Cluster(kind, count, per_node))
    cluster = own_cluster(config, Cluster(kind, 1, per_node))
    return Target(config, cluster, (f"{cluster.count} GPUs by the configuration's own layout; --gpus N for others",))


def own_cluster(config: Config, like: Cluster) -> Cluster:
    """The fewest GPUs that hold a configuration in its own layout, in whole nodes if possible; where none do, the
    fewest that it can run on.

    Args:
        like: kind of the GPUs and of their nodes.
    """
    check_precision(config)
    counts = [ranks for ranks in _possible_worlds(config) if ranks >= like.per_node and ranks % like.per_node == 0]
    counts += [ranks for ranks in reversed(_possible_worlds(config)) if ranks not in counts]
    schedule, vocab_size = checked_schedule(config), vocabulary_size(config)
    for ranks in counts:
        data_parallel = ranks // config.parallel.model_ranks
        memory = fullest(estimate_memory(config, schedule, vocab_size, data_parallel)).total
        if memory <= MEMORY_SHARE * like.gpu.memory:
            return Cluster(like.gpu, ranks, like.per_node)
    return Cluster(like.gpu, (counts or [config.parallel.model_ranks])[0], like.per_node)


def _possible_worlds(config: Config) -> list[int]:
    """Numbers of processes that the layout and the batch allow, rising."""
    microbatches = config.training.global_batch_size // config.training.micro_batch_size
    found = []
    for data_parallel in range(1, microbatches + 1):
        if microbatches % data_parallel == 0:
            try:
                check_world(config, data_parallel * config.parallel.model_ranks)
            except ConfigError:
                continue
            found.append(data_parallel * config.parallel.model_ranks)
    return found


def _with_best_layout(config: Config, clusters: list[Cluster]) -> Target:
    """The fastest layout on the first of the clusters that has one."""
    schedule, vocab_size = checked_schedule(config), vocabulary_size(config)
    attention, settings = config.attention, "full attention"
    if attention.kind == "moba":
        sizes = f"block_size {attention.block_size}, top_k {attention.top_k}"
        settings = f"MoBA ({sizes}, the last {attention.last_n_full} layers full)"
    settings = (
        f"continued pretraining with {settings} at {config.data.sequence_length:,} tokens, "
        f"{config.tokens_per_step:,} a step"
    )
    for cluster in clusters:
        best = suggest_layouts(config, schedule, vocab_size, cluster, limit=1)
        if best:
            config = best[0].saving.of(config.model_copy(update={"parallel": best[0].parallel}))
            return Target(config, cluster, (settings, f"the fastest layout on {cluster.count} GPUs:"))
    return Target(config, clusters[-1], (settings,))
