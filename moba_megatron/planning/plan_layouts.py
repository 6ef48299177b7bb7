"""Layouts that fit: tensor x context x pipeline x data parallel sizes and recomputation, the fastest first.

Of a mixture of experts also expert-parallel sizes: all that divide the experts and the GPUs of a pipeline stage.

Every combination of powers of two that divides the GPUs is compared with the configuration's own checks (divisibility
of heads, feed-forward, layers, sequence and batch; an exchange that can run), then against memory, then timed. For each
the fastest way to save memory that fits is taken (`plan_savings`). Pipeline stages are cut so that the slowest is as
fast as can be: full layers at the end of the model, which cost many times a MoBA layer at great length, and the loss
make the last stages shorter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass

from moba_megatron.config import Config, ConfigError, ParallelConfig, check_world
from moba_megatron.config.checks import combination_problems
from moba_megatron.config.words import divisors
from moba_megatron.model.exchange_choice import resolve_exchange
from moba_megatron.model.schedule import AttentionSchedule
from moba_megatron.planning.plan_machines import MEMORY_SHARE, Cluster
from moba_megatron.planning.plan_savings import Saving, fitting
from moba_megatron.planning.plan_stages import Stage
from moba_megatron.planning.plan_time import layer_seconds, loss_seconds
from moba_megatron.planning.plan_traffic import tensor_moved
from moba_megatron.planning.run_plan import mean_step_seconds, stage_shares

# A stage that is slower than the best cut by less than this keeps equal stages.
EQUAL_STAGES_MAY_COST = 1.02


@dataclass(frozen=True)
class Layout:
    """A layout that fits, what it takes, and the overrides that ask for it; `mixture`: of experts."""

    parallel: ParallelConfig
    data: int
    saving: Saving
    memory: int
    step_seconds: float
    tokens_per_second: float
    mixture: bool = False

    @property
    def overrides(self) -> list[str]:
        """`key=value` arguments for train.py and plan, whatever layout the configuration has."""
        values = {
            "parallel.tensor": self.parallel.tensor,
            "parallel.sequence": self.parallel.sequence,
            "parallel.context": self.parallel.context,
            "parallel.exchange": "auto",
            "parallel.hierarchical_context": None,
            "parallel.pipeline": self.parallel.pipeline,
            "parallel.pipeline_layers": self.parallel.pipeline_layers,
            "parallel.virtual_pipeline": None,
            "parallel.distributed_optimizer": self.parallel.distributed_optimizer,
            "parallel.overlap_grad_reduce": self.parallel.overlap_grad_reduce,
            **{f"training.{key}": value for key, value in self.saving.settings.items()},
        }
        if self.mixture:
            values["parallel.expert"] = self.parallel.expert
            values["parallel.expert_tensor"] = self.parallel.expert_tensor
            values["parallel.expert_dispatcher"] = self.parallel.expert_dispatcher
        # Without blanks, so that a shell takes each as one word.
        words = {key: value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
                 for key, value in values.items()}  # fmt: skip
        return [f"{key}={word}" for key, word in words.items()]


def suggest_layouts(
    config: Config, schedule: AttentionSchedule, vocab_size: int, cluster: Cluster, limit: int = 5
) -> list[Layout]:
    """The fastest layouts that fit; none if nothing does.

    Batch sizes stay as the configuration has them.
    """
    found = [
        layout
        for parallel in _sizes(config, cluster)
        if (layout := _fitting(config, parallel, schedule, vocab_size, cluster)) is not None
    ]
    return sorted(found, key=lambda layout: layout.step_seconds)[:limit]


def _sizes(config: Config, cluster: Cluster) -> Iterator[ParallelConfig]:
    for tensor in _powers(min(cluster.per_node, cluster.count)):
        for context in _powers(cluster.count // tensor):
            for pipeline in _powers(min(config.model.num_layers, cluster.count // (tensor * context))):
                if cluster.count % (tensor * context * pipeline) == 0:
                    shared = cluster.count > tensor * pipeline  # several ranks have the same weights
                    one = ParallelConfig(
                        tensor=tensor,
                        sequence=tensor > 1,
                        context=context,
                        pipeline=pipeline,
                        distributed_optimizer=shared,
                        overlap_grad_reduce=shared,
                    )
                    yield from _expert_sizes(config, one, cluster.count // pipeline)


def _expert_sizes(config: Config, parallel: ParallelConfig, stage_ranks: int) -> Iterator[ParallelConfig]:
    """A layout with every number of expert-parallel ranks. How experts are split and what sends tokens to them stays as
    it is configured."""
    experts = config.model.num_moe_experts
    if experts is None:
        yield parallel
        return
    own = config.parallel
    for ranks in divisors(experts):
        if stage_ranks % (ranks * own.expert_tensor) == 0:
            sizes = {"expert": ranks, "expert_tensor": own.expert_tensor, "expert_dispatcher": own.expert_dispatcher}
            yield parallel.model_copy(update=sizes)


def _powers(limit: int) -> Iterator[int]:
    size = 1
    while size <= limit:
        yield size
        size *= 2


def _fitting(
    config: Config, parallel: ParallelConfig, schedule: AttentionSchedule, vocab_size: int, cluster: Cluster
) -> Layout | None:
    """The layout with the fastest recomputation that fits, or None."""
    # What the configuration computes again is for its own layout.
    candidate = Saving().of(config.model_copy(update={"parallel": parallel}))
    layers = config.model.num_layers
    if parallel.pipeline > 1 and layers % parallel.pipeline:
        # Any cut will do for the checks; the right one follows.
        even = [layers // parallel.pipeline + (i < layers % parallel.pipeline) for i in range(parallel.pipeline)]
        candidate = _with(candidate, pipeline_layers=even)
    try:
        data = check_world(candidate, cluster.count)
        if combination_problems(candidate):
            return None
        resolve_exchange(candidate)
    except ConfigError:
        return None
    if parallel.pipeline > 1:
        candidate = _with(candidate, pipeline_layers=balanced_layers(candidate, schedule, vocab_size, cluster))
    room = MEMORY_SHARE * cluster.gpu.memory
    found = []
    for saving, memory in fitting(candidate, schedule, vocab_size, data, room):
        trial = saving.of(candidate)
        seconds = mean_step_seconds(trial, schedule, vocab_size, data, cluster)
        mixture, rate = config.model.num_moe_experts is not None, config.tokens_per_step / seconds
        found.append(Layout(trial.parallel, data, saving, memory, seconds, rate, mixture))
    return min(found, key=lambda layout: layout.step_seconds, default=None)


def balanced_layers(config: Config, schedule: AttentionSchedule, vocab_size: int, cluster: Cluster) -> list[int] | None:
    """Layers of each pipeline stage that make the slowest stage fastest; None where equal stages are as good."""
    stages, exchange = config.parallel.pipeline, resolve_exchange(config)
    one_of_each = {
        experts: Stage(0, first=False, last=False, layers=(number,), parameters=0, in_flight=1)
        for number, experts in enumerate(config.model.expert_layers, start=1)
    }
    tensor = {experts: tensor_moved(config, cluster, stage).seconds for experts, stage in one_of_each.items()}
    seconds = [0.0] * config.model.num_layers
    for share, attention in zip(stage_shares(schedule, config.training.steps), schedule.stages, strict=True):
        kinds = list(zip(attention, config.model.expert_layers, strict=True))
        each = {kind: layer_seconds(config, kind[0], cluster, exchange, kind[1]).seconds for kind in set(kinds)}
        for index, kind in enumerate(kinds):
            seconds[index] += share * (each[kind] + tensor[kind[1]])
    tail = loss_seconds(config, vocab_size, cluster)
    counts = _cut(seconds, stages, tail)
    if len(seconds) % stages == 0:
        even = [len(seconds) // stages] * stages
        if _slowest(seconds, even, tail) <= EQUAL_STAGES_MAY_COST * _slowest(seconds, counts, tail):
            return None
    return counts


def _cut(seconds: list[float], stages: int, tail: float) -> list[int]:
    """Cut a row of layers into stages so that the longest is as short as can be; `tail` comes after the last layer.

    Every stage gets a layer; equal maxima are broken towards equal counts. `best[n]` is the longest stage, and the size
    of the first one, when the last n layers fill as many stages as have been looked at.

    >>> _cut([1.0, 1.0, 1.0, 1.0, 1.0, 3.0], 2, tail=0.0)
    [5, 1]
    """
    layers = len(seconds)
    sums = [0.0]
    for value in reversed(seconds):
        sums.append(sums[-1] + value)
    impossible = (math.inf, 0)
    best = [impossible] + [(sums[n] + tail, n) for n in range(1, layers + 1)]
    choices = [[n for _, n in best]]
    for stage in range(2, stages + 1):
        row = [impossible] * (layers + 1)
        for n in range(stage, layers + 1):
            chosen = (math.inf, 0.0, 0)
            for k in range(1, n):
                first = sums[n] - sums[n - k]
                if first > chosen[0]:
                    break  # and longer ones as well
                chosen = min(chosen, (max(first, best[n - k][0]), abs(k - n / stage), k))
            row[n] = (chosen[0], chosen[2])
        best = row
        choices.append([size for _, size in row])
    counts, left = [], layers
    for stage in range(stages, 0, -1):
        size = choices[stage - 1][left]
        counts.append(size)
        left -= size
    return counts


def _slowest(seconds: list[float], counts: list[int], tail: float) -> float:
    times, start = [], 0
    for count in counts:
        times.append(sum(seconds[start : start + count]))
        start += count
    return max([*times[:-1], times[-1] + tail])


def _with(config: Config, **parallel) -> Config:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})
