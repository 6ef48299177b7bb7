"""The plan of a configuration on a cluster: memory, bytes, time and cost, and layouts that would serve it better."""

from __future__ import annotations

from dataclasses import dataclass

from moba_megatron.config import Config, ConfigError, check_world
from moba_megatron.config.sizes import idle_parameters
from moba_megatron.corpus.tokenizer import Tokenizer
from moba_megatron.model.schedule import FULL, AttentionSchedule
from moba_megatron.planning.attention_advice import SlowerThanFull, slower_than_full, with_full_exchange
from moba_megatron.planning.flops import training_flops_per_token
from moba_megatron.planning.memory import MemoryEstimate, estimate_memory, fullest
from moba_megatron.planning.memory_evaluation import EvaluationMemory, evaluation_memory
from moba_megatron.planning.plan_machines import MEMORY_SHARE, Cluster
from moba_megatron.planning.plan_savings import Saving, savings, with_offloading
from moba_megatron.planning.plan_stages import whole_model
from moba_megatron.planning.plan_time import StepTime, step_time


@dataclass(frozen=True)
class RunPlan:
    """The estimates for a configuration on a cluster.

    Attributes:
        memory: of a rank of each pipeline stage.
        evaluation: of the fullest rank of `evaluate` in the same layout; the dearest stage of the training counts.
        steps: time of a step in each stage of the training; `shares` of the steps that are taken in each.
        full: time of a step if every layer attended fully.
        slower: MoBA settings that take longer than full attention would.
        model_flops: of one step in each stage of the training: nothing recomputed.
        parameters: of the whole model; `active`: those that a token passes, embedding and output layer included;
            `trained`: those that learn (`training.train_only`).
    """

    config: Config
    cluster: Cluster
    data_parallel: int
    memory: tuple[MemoryEstimate, ...]
    evaluation: EvaluationMemory
    steps: tuple[StepTime, ...]
    shares: tuple[float, ...]
    full: StepTime
    slower: tuple[SlowerThanFull, ...]
    model_flops: tuple[float, ...]
    parameters: int
    active: int
    trained: int

    @property
    def peak(self) -> MemoryEstimate:
        return fullest(list(self.memory))

    @property
    def fits(self) -> bool:
        return self.peak.total <= MEMORY_SHARE * self.cluster.gpu.memory

    @property
    def step_seconds(self) -> float:
        """Mean over the training."""
        return sum(step.seconds * share for step, share in zip(self.steps, self.shares, strict=True))

    @property
    def tokens_per_second(self) -> float:
        return self.config.tokens_per_step / self.step_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs, by attended pairs, over the cluster's peak; mean over the training."""
        flops = sum(flops * share for flops, share in zip(self.model_flops, self.shares, strict=True))
        return flops / (self.step_seconds * self.cluster.gpu.machine.peak * self.cluster.count)

    @property
    def hours(self) -> float:
        """Of the whole training."""
        return self.step_seconds * self.config.training.steps / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.cluster.count


@dataclass(frozen=True)
class Alternative:
    """The same layout with something else computed again, or with smaller gradients: bytes of the fullest rank, and
    seconds of a step, the mean over the training. `saving` is None for the gradients."""

    saving: Saving | None
    memory: int
    step_seconds: float


def alternatives(config: Config, schedule: AttentionSchedule, vocab_size: int, cluster: Cluster) -> list[Alternative]:
    """The cost of each way to save memory, for a configuration in its own layout.

    Raises:
        ConfigError: sizes that do not fit the number of GPUs or each other.
    """
    data_parallel = check_world(config, cluster.count)
    own, known = Saving.in_use(config), [*savings(config), *with_offloading(config)]
    if own not in known:
        known.insert(0, own)
    variants: list[tuple[Saving | None, Config]] = [(saving, saving.of(config)) for saving in known]
    if config.parallel.distributed_optimizer and config.training.gradient_precision != "bf16":
        half = config.training.model_copy(update={"gradient_precision": "bf16"})
        variants.append((None, config.model_copy(update={"training": half})))
    found = []
    for saving, variant in variants:
        memory = fullest(estimate_memory(variant, schedule, vocab_size, data_parallel)).total
        seconds = mean_step_seconds(variant, schedule, vocab_size, data_parallel, cluster)
        found.append(Alternative(saving, memory, seconds))
    return found


def mean_step_seconds(
    config: Config, schedule: AttentionSchedule, vocab_size: int, data_parallel: int, cluster: Cluster
) -> float:
    """Seconds of a step, the mean over the training."""
    shares = stage_shares(schedule, config.training.steps)
    steps = [step_time(config, layers, vocab_size, data_parallel, cluster) for layers in schedule.stages]
    return sum(step.seconds * share for step, share in zip(steps, shares, strict=True))


def vocabulary_size(config: Config) -> int:
    """Entries of the vocabulary, without padding: as configured, else of the tokenizer.

    Raises:
        ConfigError: there is no model.vocab_size and no tokenizer.
    """
    if config.model.vocab_size:
        return config.model.vocab_size
    try:
        return Tokenizer(config.data.tokenizer).vocab_size
    except (OSError, ValueError) as error:
        raise ConfigError([
            f"model.vocab_size is not set and data.tokenizer = {config.data.tokenizer} cannot be read: {error}"
        ]) from error  # fmt: skip


def plan_run(config: Config, schedule: AttentionSchedule, vocab_size: int, cluster: Cluster) -> RunPlan:
    """Estimate a configuration.

    Args:
        vocab_size: entries of the vocabulary, without padding.

    Raises:
        ConfigError: sizes that do not fit the number of GPUs or each other, or a precision without a model.
    """
    check_precision(config)
    data_parallel = check_world(config, cluster.count)
    full = (FULL,) * schedule.num_layers
    length = config.data.sequence_length
    flops = [
        training_flops_per_token(config, vocab_size, [layer.sizes for layer in layers])
        * config.training.global_batch_size
        * length
        for layers in schedule.stages
    ]
    whole = whole_model(config, vocab_size)
    return RunPlan(
        config=config,
        cluster=cluster,
        data_parallel=data_parallel,
        memory=tuple(estimate_memory(config, schedule, vocab_size, data_parallel)),
        evaluation=max(
            (evaluation_memory(config, layers, vocab_size, "cuda") for layers in schedule.stages),
            key=lambda memory: memory.total,
        ),
        steps=tuple(step_time(config, layers, vocab_size, data_parallel, cluster) for layers in schedule.stages),
        shares=stage_shares(schedule, config.training.steps),
        full=step_time(with_full_exchange(config), full, vocab_size, data_parallel, cluster),
        slower=tuple(slower_than_full(config, schedule, cluster)),
        model_flops=tuple(flops),
        parameters=whole.parameters,
        active=whole.parameters - idle_parameters(config.model),
        trained=whole.trained,
    )


def check_precision(config: Config) -> None:
    """Refuse configurations for which there is no model of times.

    Raises:
        ConfigError: another precision than bf16.
    """
    if config.training.precision != "bf16":
        raise ConfigError([
            f"training.precision = {config.training.precision}: times on GPUs are modelled only for bf16: add "
            "training.precision=bf16"
        ])  # fmt: skip


def stage_shares(schedule: AttentionSchedule, steps: int) -> tuple[float, ...]:
    """The share of the steps that is taken in each stage of the training."""
    ends = [0, *(schedule.last_step(stage, steps) for stage in range(len(schedule.stages)))]
    return tuple((end - start) / steps for start, end in zip(ends, ends[1:], strict=False))
