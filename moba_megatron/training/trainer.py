"""The trainer: one step from batch to metrics, and the loop around it, until the horizon, a stop or a failure.

The order within one step is fixed, because resuming bit for bit depends on it: attention stage, forward and backward
pass, optimizer, record, evaluation, checkpoint, stop. Evaluation draws no random numbers and changes no state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.timers import Timers

from moba_megatron.checkpoint import NotFinite, SaveError, TrainingState, load_training
from moba_megatron.config import Config
from moba_megatron.data.feed import rank_batches
from moba_megatron.evaluation.losses.positions import evaluate
from moba_megatron.model.core_attention import set_attention_stage
from moba_megatron.model.experts import expert_biases
from moba_megatron.model.forward import Batch
from moba_megatron.parallel.wire import observe
from moba_megatron.runs.folder import RunFolder
from moba_megatron.runs.metrics import MetricsWriter
from moba_megatron.training.batch_pass import BatchPass, compute_gradients, expert_counts
from moba_megatron.training.divergence import (
    DivergencePolicy,
    SkippedBatches,
    Spikes,
    StepDiverged,
    checkpoint_before,
    last_losses,
)
from moba_megatron.training.faults import StopRequest, TrainingDiverged
from moba_megatron.training.finite import gathered, rank_facts, refuse_weights, samples_of_rank
from moba_megatron.training.optimizer import UpdateRefused, update
from moba_megatron.training.preflight import Preflight
from moba_megatron.training.profiling import step_profiler
from moba_megatron.training.progress import ProgressView
from moba_megatron.training.saving import Saver
from moba_megatron.training.step_metrics import context_metrics, gpu_metrics
from moba_megatron.training.watch import Watch

# Number of steps whose median gives the estimate of the time left.
RECENT_STEPS = 20


@dataclass
class LoopEnd:
    """After which step the loop ended, and the signal that stopped it, if one did."""

    step: int
    signal: str | None


class Trainer:
    """Trains one rank's model chunks. All ranks call the same methods together.

    Args:
        ready: what preflight found.
        state: model, optimizer and scheduler, as checkpoints hold them.
        chunks: the model's chunks, wrapped for data parallelism.
        train_data, validation_data: datasets of samples; without validation data nothing is evaluated.
        writer: keeps the records; None on ranks that keep none.
        keeps: whether this is the run itself, which saves; False: its steps leave nothing on disk.
        watch: told of everything that is done, see `watch`.
    """

    def __init__(
        self,
        config: Config,
        ready: Preflight,
        state: TrainingState,
        chunks: list[DistributedDataParallel],
        train_data: torch.utils.data.Dataset,
        validation_data: torch.utils.data.Dataset | None,
        progress: ProgressView,
        writer: MetricsWriter | None,
        device: torch.device,
        *,
        keeps: bool = True,
        watch: Watch | None = None,
    ):
        self.config, self.ready, self.state, self.chunks = config, ready, state, chunks
        self.train_data, self.validation_data = train_data, validation_data
        self.progress, self.writer, self.device = progress, writer, device
        self.watch = watch or Watch(None)
        self.folder = RunFolder(config.run.dir)
        self.saver = Saver(config, ready, self.folder, self._flush_records, progress.say) if keeps else None
        self.samples_at_once = config.training.micro_batch_size * ready.data_parallel
        self.num_microbatches = config.training.global_batch_size // self.samples_at_once
        self.timers = Timers(log_level=0, log_option="max")
        self.stage = -1
        self.seconds: list[float] = []
        self.skipped = SkippedBatches(config.training.skip_batches, ready.position.skipped)
        self.policy = DivergencePolicy(config, self.folder, train_data, writes=writer is not None)
        self.spikes = Spikes(config.training.spike_threshold, config.training.spike_window)
        self._begin_after(ready.position.step)

    def train(self, first_step: int, evaluate_first: bool = False) -> LoopEnd:
        """Train from `first_step` (from 1) to the horizon or `training.stop_after`. The last state is always saved.

        Args:
            evaluate_first: evaluate the step before `first_step`.

        Raises:
            TrainingDiverged: on every rank, as `training.on_divergence` says. A checkpoint that was being written is
                complete.
        """
        config = self.config
        last_step = min(config.training.steps, config.training.stop_after or config.training.steps)
        number, signal = first_step - 1, None
        with (
            StopRequest() as stop,
            self.progress,
            step_profiler(config, self.folder, self.device, first_step) as profiler,
        ):
            try:
                if evaluate_first:
                    self.attend_as_at(number)
                    self.evaluate(number)
                while number < last_step and signal is None:
                    number += 1
                    back_to = self.take(number, last_step)
                    if back_to is not None:
                        number = back_to
                        continue
                    profiler.step()
                    signal = stop.agreed(self.device)
                    stopping = signal is not None
                    try:
                        self._after_step(number, stopping=stopping, last=stopping or number == last_step)
                    except NotFinite as error:
                        number = self._answer_weights(error.step or number, error)
                self.saver.wait()
            except TrainingDiverged:
                # What is being written is from before.
                with suppress(SaveError, NotFinite):
                    self.saver.wait()
                raise
        return LoopEnd(number, signal)

    def _after_step(self, number: int, *, stopping: bool, last: bool) -> None:
        """Evaluate and save, where they are due.

        Args:
            stopping: whether a signal came: then the state first, whoever sent it may not wait for long.
            last: whether no step follows.

        Raises:
            NotFinite: on every rank, of the weights, or of a state that was written.
        """
        if last:
            self.check_weights(number)
        evaluation = self.validation_data is not None and evaluation_is_due(self.config, number)
        if evaluation and not stopping:
            self.evaluate(number)
        if last or _due(self.config.checkpoint.every, number):
            self.save(number, last=last)
        else:
            self.saver.poll()
        if evaluation and stopping:
            self.evaluate(number)

    def take(self, number: int, last_step: int) -> int | None:
        """Take the next step, or leave its batch out, and record it.

        Returns:
            None; or the step that the run has gone back to, from which it goes on.
        """
        self.watch.at(f"step {number}", number)
        why = self.skipped.why(number)
        try:
            metrics = self.step(number) if why is None else self.pass_over(number, why)
        except StepDiverged as diverged:
            back_to = self._answer(number, diverged)
            if back_to is not None:
                return back_to
            metrics = self._without_update(number, diverged.why)
        if self.writer:
            self.writer.step(metrics)
        if "skipped" in metrics:
            self.progress.say(f"step {number}: its batch is left out: {metrics['skipped']}")
        else:
            self.progress.step(metrics, seconds_left=(last_step - number) * self._median_seconds())
        return None

    def step(self, number: int) -> dict[str, Any]:
        """Train on the next global batch, from its microbatches to the line of metrics.

        Args:
            number: this step's number, from 1.

        Returns:
            The mean loss over the tokens of the global batch, the gradient norm before clipping, the learning rate,
            times in seconds, and the other metrics of docs/run_folder.md.

        Raises:
            StepDiverged: on every rank, if loss or gradient norm are not finite on any, or the loss is a spike that is
                treated alike. The weights have not changed.
        """
        started = time.perf_counter()
        biases = [(bias, bias.clone()) for bias in expert_biases(self.state.model)]
        self.timers("forward-backward", log_level=0).start()
        with observe() as seen:
            loss = self.compute(number)
        self.timers("forward-backward").stop()

        self.timers("optimizer", log_level=0).start()
        self.state.scheduler.step(1)
        spike = self.spikes.judge(loss)
        harmful = spike if self.config.training.on_spike == "as_divergence" else None
        try:
            grad_norm = update(
                self.state.optimizer,
                lambda norm: not (math.isfinite(loss) and math.isfinite(norm)) or harmful is not None,
            )
        except UpdateRefused as refused:
            for bias, before in biases:
                bias.copy_(before)
            self.timers("optimizer").stop()
            self.timers("optimizer").reset()
            self.timers("forward-backward").reset()
            raise StepDiverged.of(loss, refused.grad_norm, harmful) from None
        self.timers("optimizer").stop()

        on_gpu = self.device.type == "cuda"
        self.seconds.append(time.perf_counter() - started)
        self.spikes.losses.append(loss)
        if spike:
            self.policy.record(number, StepDiverged("spike", spike, loss, grad_norm), "none", self.ready.position)
            self.progress.say(f"step {number}: {spike} ({self.folder.divergences})")
        return {
            "step": number,
            "tokens": self.tokens_at(number),
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": get_canonical_lr_for_logging(self.state.optimizer.param_groups),
            "step_seconds": self.seconds[-1],
            "forward_backward_seconds": self.timers("forward-backward").elapsed(reset=True),
            "optimizer_seconds": self.timers("optimizer").elapsed(reset=True),
            "tokens_per_second": self.config.tokens_per_step / self.seconds[-1],
            "stage": self.stage,
            **self.passed.metrics,
            **(context_metrics(seen) if self.config.parallel.context > 1 else {}),
            **(gpu_metrics(self.config, self.ready, self.stage, self.seconds[-1]) if on_gpu else {}),
        }

    def compute(self, number: int) -> float:
        """Forward and backward pass of the next global batch: gradients, added up over the ranks, and the mean loss
        over its tokens. All that it gave stays in `passed`."""
        self.attend_as_at(number)
        self.passed = compute_gradients(
            self.config, self.state, self.chunks, self.batches, self.num_microbatches, self.device
        )
        return self.passed.loss

    def pass_over(self, number: int, why: str) -> dict[str, Any]:
        """Leave the next global batch out: only data and learning rate advance. Returns the line of metrics."""
        self.attend_as_at(number)
        for batches in self.batches:
            for _ in range(self.num_microbatches):
                next(batches)
        self.state.scheduler.step(1)
        return self._without_update(number, why)

    def facts(self, number: int) -> dict[str, Any]:
        """What this rank has that is not finite after `compute` of a step, see `finite.rank_facts`."""
        ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        return rank_facts(
            self.state.model, self.passed.sums, samples_of_rank(self.config, self.ready.position, number, *ranks)
        )

    def _answer(self, number: int, diverged: StepDiverged) -> int | None:
        """Apply `training.on_divergence`. Returns the step to which the run has gone back, or None if it continues."""
        position, facts = self.ready.position, gathered(self.facts(number))
        answer = self.policy.answer(number, diverged, facts, self.skipped, position)
        self.skipped.add(answer.blamed, f"in step {number} {diverged.why}", self.config, position)
        return self._go_back(answer.blamed) if answer.action == "rollback" else None

    def _answer_weights(self, number: int, error: NotFinite) -> int:
        """As `_answer`, where an update left weights, or the optimizer's state, not finite: going back alone fixes it.
        Returns the step that the run has gone back to."""
        policy, diverged = self.config.training.on_divergence, StepDiverged("weights", str(error), None, None)
        if policy != "rollback":
            self.policy.record(number, diverged, "stop", self.ready.position, gathered(self.facts(number)))
            more = "; leaving out a batch cannot fix weights: use training.on_divergence=rollback" * (policy == "skip")
            raise TrainingDiverged(f"{error}{more}") from error
        back_to = self._answer(number, diverged)
        assert back_to is not None, "rollback goes back or raises"
        return back_to

    def _go_back(self, before: int) -> int:
        """Load the newest checkpoint, which must be from before a step, and return its step."""
        with suppress(NotFinite):
            self.saver.wait()
        checkpoint, step = checkpoint_before(before, self.folder, self.ready.resume)
        self.progress.say(f"going back to {checkpoint}, to continue without the batch of step {before}")
        # Loading adds the steps of the checkpoint to those that were counted.
        self.state.scheduler.num_steps = 0
        verify = self.config.checkpoint.verify
        load_training(checkpoint, self.state, self.config.parallel.model_dump(), check_files=verify)
        if self.writer:
            self.writer.go_back(step)
        self._begin_after(step)
        return step

    def _begin_after(self, step: int) -> None:
        """Take the data, and what spikes are compared with, as they are after a step."""
        position = self.ready.position.after(step, self.config)
        self.batches = self._feed(self.train_data, position.in_order, position.order_length(self.config))
        self.passed = BatchPass([], math.nan, {})
        losses = [last_losses(self.folder, self.config.training.spike_window) if self.writer else []]
        torch.distributed.broadcast_object_list(losses, src=0)
        self.spikes.remember(losses[0])

    def _without_update(self, number: int, why: str) -> dict[str, Any]:
        """The line of metrics of a step that changed nothing."""
        self.skipped.add(number, why, self.config, self.ready.position)
        return {
            "step": number,
            "tokens": self.tokens_at(number),
            "loss": None,
            "grad_norm": None,
            "lr": get_canonical_lr_for_logging(self.state.optimizer.param_groups),
            "step_seconds": 0.0,
            "stage": self.stage,
            "skipped": why,
        }

    def attend_as_at(self, number: int) -> None:
        """Let the model attend as in the stage of the schedule that a step belongs to."""
        stage = self.ready.schedule.stage_at(number, self.config.training.steps)
        if stage != self.stage:
            set_attention_stage(self.state.model, self.ready.schedule, stage)
            self.stage = stage

    def evaluate(self, number: int) -> None:
        """Evaluate on the validation data after a step, and record it."""
        self.watch.at(f"evaluation after step {number}", number)
        samples = self.config.evaluation.samples
        batches = self._feed(self.validation_data, 0, samples)
        result = evaluate(self.chunks, batches, self.config, math.ceil(samples / self.samples_at_once)).to_dict()
        result |= expert_counts(self.config, self.state.model, self.device)
        if not math.isfinite(result["loss"]):
            raise TrainingDiverged(
                f"validation after step {number}: the loss is {result['loss']}. The weights after this step are "
                f"useless; continue from a checkpoint before it with a lower optimizer.lr"
            )
        if self.writer:
            self.writer.evaluation({"step": number, "tokens": self.tokens_at(number), **result})
        trailing = "" if result["trailing_loss"] is None else f"  trailing loss {result['trailing_loss']:.4f}"
        self.progress.say(f"validation after step {number}  loss {result['loss']:.4f}{trailing}")

    def check_weights(self, number: int) -> None:
        """Raise NotFinite on every rank if the update of a step left weights that are not finite."""
        refuse_weights(self.state.model, number)

    def save(self, number: int, *, last: bool) -> None:
        """Start a checkpoint of the state after a step; the last one of a process is complete then."""
        self.watch.at(f"checkpoint after step {number}", number)
        position = replace(self.ready.position.after(number, self.config), skipped=tuple(self.skipped.entries()))
        self.saver.save(self.state, position, last=last)

    def _flush_records(self) -> None:
        if self.writer:
            self.writer.flush_to_disk()

    def tokens_at(self, number: int) -> int:
        """Tokens that all steps up to a number have read."""
        return self.ready.position.after(number, self.config).tokens

    def _feed(self, dataset: Any, consumed: int, samples: int) -> list[Iterator[Batch]]:
        """One iterator of microbatches for each model chunk."""
        which = {"consumed_samples": consumed, "num_samples": samples, "device": self.device}
        return [rank_batches(dataset, self.config, eod_id=self.ready.data.eod_id, **which) for _ in self.chunks]

    def _median_seconds(self) -> float:
        recent = sorted(self.seconds[-RECENT_STEPS:])
        return recent[len(recent) // 2]


def evaluation_is_due(config: Config, step: int) -> bool:
    """Whether a run that has validation data evaluates itself after this step."""
    return _due(config.evaluation.every, step) or step == config.training.steps


def _due(every: int | None, number: int) -> bool:
    return every is not None and number % every == 0
