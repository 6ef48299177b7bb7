"""One optimizer step: microbatches through megatron-core's pipeline schedule, then the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, get_canonical_lr_for_logging
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.timers import Timers

from moba_megatron.config import Config
from moba_megatron.model.forward import Batch, forward_step, microbatch_shape, reduce_over_ranks
from moba_megatron.parallel.wire import Observation, observe

_MEND = "Lower optimizer.lr, lengthen optimizer.warmup_steps, or look at this step's data"


class TrainingDiverged(RuntimeError):
    """The loss or the gradient stopped being a number. Nothing of this step is saved."""


@dataclass
class StepResult:
    """Mean loss over the tokens of the global batch, gradient norm before clipping, learning rate that was used.

    context: what this rank saw of context parallelism in this step: `context_bytes` received from other ranks, and
        under `dispatch` the `dispatch_load`, the busiest rank's share over the mean, at its worst; else empty.
    """

    loss: float
    grad_norm: float
    lr: float
    context: dict[str, float]


class TrainStep:
    """Forward, backward and update for one global batch. All ranks call it together."""

    def __init__(
        self,
        model: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        config: Config,
        num_microbatches: int,
        timers: Timers,
    ):
        self.model = model
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.config = config
        self.num_microbatches = num_microbatches
        self.timers = timers
        self.forward_backward = get_forward_backward_func()

    def __call__(self, batches: list[Iterator[Batch]], number: int) -> StepResult:
        """Train on the next `num_microbatches` of each iterator (one iterator a model chunk).

        Args:
            number: this step's number, from 1, for messages.

        Raises:
            TrainingDiverged: on every rank, if the loss or the gradient norm is not finite.
        """
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.timers("forward-backward", log_level=0).start()
        with observe() as seen:
            reductions = self.forward_backward(
                forward_step_func=forward_step,
                data_iterator=batches if len(batches) > 1 else batches[0],
                model=self.model if len(self.model) > 1 else self.model[0],
                num_microbatches=self.num_microbatches,
                **microbatch_shape(self.config.data, self.config.training.micro_batch_size),
                forward_only=False,
            )
        self.timers("forward-backward").stop()
        total, count = reduce_over_ranks([item["sums"] for item in reductions], (2,)).tolist()
        loss = total / max(count, 1)
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"step {number}: the loss is {loss}. Lower optimizer.lr, or look at this step's data"
            )
        self.timers("optimizer", log_level=0).start()
        self.scheduler.step(1)
        _, grad_norm, _ = self.optimizer.step()
        self.timers("optimizer").stop()
        if not math.isfinite(grad_norm):
            raise TrainingDiverged(f"step {number}: the gradient norm is {grad_norm}. {_MEND}")
        return StepResult(
            loss=loss,
            grad_norm=float(grad_norm),
            lr=get_canonical_lr_for_logging(self.optimizer.param_groups),
            context=_context_records(seen) if self.config.parallel.context > 1 else {},
        )


def _context_records(seen: Observation) -> dict[str, float]:
    records: dict[str, float] = {"context_bytes": seen.total}
    loads = [load.most_after / load.mean for load in seen.loads if load.mean]
    return {**records, "dispatch_load": max(loads)} if loads else records
