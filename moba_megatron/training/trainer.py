"""The trainer: one step from batch to metrics, and the loop around it, until the horizon, a stop or a failure.

The order within one step is fixed, because resuming bit for bit depends on it: attention stage, forward and backward
pass, optimizer, record, evaluation, checkpoint, stop. Evaluation draws no random numbers and changes no state.
"""

from __future__ import annotations

import importlib.metadata
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.timers import Timers

from moba_megatron import __version__
from moba_megatron.checkpoint import CheckpointWriter, Manifest, TrainingState
from moba_megatron.checkpoint.finite import list_of_names, weights_not_finite
from moba_megatron.config import Config
from moba_megatron.data.feed import rank_batches
from moba_megatron.evaluation.losses.positions import evaluate
from moba_megatron.model.core_attention import set_attention_stage
from moba_megatron.model.forward import Batch, forward_step, microbatch_shape, reduce_over_ranks
from moba_megatron.parallel.wire import Observation, observe
from moba_megatron.planning.flops import peak_flops, training_flops_per_token
from moba_megatron.runs.folder import RunFolder
from moba_megatron.runs.metrics import MetricsWriter
from moba_megatron.training.faults import StopRequest, TrainingDiverged
from moba_megatron.training.preflight import Preflight
from moba_megatron.training.progress import ProgressView

# Steps whose median says how long the rest will take.
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
    ):
        self.config, self.ready, self.state, self.chunks = config, ready, state, chunks
        self.validation_data, self.progress, self.writer, self.device = validation_data, progress, writer, device
        self.folder = RunFolder(config.run.dir)
        self.checkpoints = CheckpointWriter(
            self.folder.checkpoints, keep=config.checkpoint.keep, asynchronous=config.checkpoint.asynchronous
        )
        self.samples_at_once = config.training.micro_batch_size * ready.data_parallel
        self.batches = self._feed(train_data, ready.position.in_order, ready.position.order_length(config))
        self.forward_backward = get_forward_backward_func()
        self.timers = Timers(log_level=0, log_option="max")
        self.stage = -1
        self.seconds: list[float] = []

    def train(self, first_step: int, evaluate_first: bool = False) -> LoopEnd:
        """Train from `first_step` (from 1) to the horizon or `training.stop_after`. The last state is always saved.

        Args:
            evaluate_first: evaluate the step before `first_step`.
        """
        config = self.config
        last_step = min(config.training.steps, config.training.stop_after or config.training.steps)
        saved, signal = first_step - 1, None
        number = first_step - 1
        with StopRequest() as stop, self.progress, self._profiler(first_step) as profiler:
            if evaluate_first:
                self.attend_as_at(number)
                self.evaluate(number)
            for number in range(first_step, last_step + 1):
                metrics = self.step(number)
                if self.writer:
                    self.writer.step(metrics)
                self.progress.step(metrics, seconds_left=(last_step - number) * self._median_seconds())
                profiler.step()
                signal = stop.agreed(self.device)
                if signal is not None or number == last_step:
                    self.check_weights(number)
                evaluation = self.validation_data is not None and evaluation_is_due(config, number)
                if evaluation and signal is None:
                    self.evaluate(number)
                if signal is not None or number == last_step or _due(config.checkpoint.every, number):
                    self.save(number)
                    saved = number
                else:
                    self.checkpoints.poll()
                if signal is not None:
                    # The state first: whoever sent the signal may not wait for long.
                    self.checkpoints.wait()
                    if evaluation:
                        self.evaluate(number)
                    break
            self.checkpoints.wait()
        assert saved == number, "the last state is on disk"
        return LoopEnd(number, signal)

    def step(self, number: int) -> dict[str, Any]:
        """Train on the next global batch, from its microbatches to the line of metrics.

        Args:
            number: this step's number, from 1.

        Returns:
            The mean loss over the tokens of the global batch, the gradient norm before clipping, the learning rate that
            was used, times in seconds, and what docs/run_folder.md lists beside them.

        Raises:
            TrainingDiverged: on every rank, if the loss or the gradient norm is not finite.
        """
        started = time.perf_counter()
        self.attend_as_at(number)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.state.optimizer.zero_grad()

        self.timers("forward-backward", log_level=0).start()
        with observe() as seen:
            reductions = self.forward_backward(
                forward_step_func=forward_step,
                data_iterator=self.batches if len(self.batches) > 1 else self.batches[0],
                model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
                num_microbatches=self.config.training.global_batch_size // self.samples_at_once,
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
        self.state.scheduler.step(1)
        _, grad_norm, _ = self.state.optimizer.step()
        self.timers("optimizer").stop()
        if not math.isfinite(grad_norm):
            raise TrainingDiverged(
                f"step {number}: the gradient norm is {grad_norm}. Lower optimizer.lr, lengthen "
                "optimizer.warmup_steps, or look at this step's data"
            )

        self.seconds.append(time.perf_counter() - started)
        return {
            "step": number,
            "tokens": self.tokens_at(number),
            "loss": loss,
            "grad_norm": float(grad_norm),
            "lr": get_canonical_lr_for_logging(self.state.optimizer.param_groups),
            "step_seconds": self.seconds[-1],
            "forward_backward_seconds": self.timers("forward-backward").elapsed(reset=True),
            "optimizer_seconds": self.timers("optimizer").elapsed(reset=True),
            "tokens_per_second": self.config.tokens_per_step / self.seconds[-1],
            "stage": self.stage,
            **(_context_metrics(seen) if self.config.parallel.context > 1 else {}),
            **(self._gpu_metrics() if self.device.type == "cuda" else {}),
        }

    def attend_as_at(self, number: int) -> None:
        """Let the model attend as in the stage of the schedule that a step belongs to."""
        stage = self.ready.schedule.stage_at(number, self.config.training.steps)
        if stage != self.stage:
            set_attention_stage(self.state.model, self.ready.schedule, stage)
            self.stage = stage

    def evaluate(self, number: int) -> None:
        """Evaluate on the validation data after a step, and record it."""
        samples = self.config.evaluation.samples
        batches = self._feed(self.validation_data, 0, samples)
        result = evaluate(self.chunks, batches, self.config, math.ceil(samples / self.samples_at_once)).to_dict()
        if not math.isfinite(result["loss"]):
            raise TrainingDiverged(
                f"validation after step {number}: the loss is {result['loss']}. The state after this step is of no "
                "use; go on from a checkpoint before it with a lower optimizer.lr"
            )
        if self.writer:
            self.writer.evaluation({"step": number, "tokens": self.tokens_at(number), **result})
        trailing = "" if result["trailing_loss"] is None else f"  trailing loss {result['trailing_loss']:.4f}"
        self.progress.say(f"validation after step {number}  loss {result['loss']:.4f}{trailing}")

    def check_weights(self, number: int) -> None:
        """Raise TrainingDiverged on every rank if the update of a step left weights that are not finite."""
        if names := weights_not_finite(self.state.model):
            raise TrainingDiverged(
                f"step {number}: the update left weights that are not finite: {list_of_names(names)}. Lower "
                "optimizer.lr, lengthen optimizer.warmup_steps, or look at this step's data"
            )

    def save(self, number: int) -> None:
        """Start a checkpoint of the state after a step."""
        config, position = self.config, self.ready.position.after(number, self.config)
        libraries = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core")}
        manifest = Manifest(
            step=number,
            consumed_samples=position.samples,
            consumed_tokens=position.tokens,
            data_changes=list(position.changes),
            config=config.model_dump(mode="json"),
            schedule=self.ready.schedule.to_dict(),
            data=self.ready.data.identity,
            versions={"moba-megatron": __version__, **libraries},
        )
        self.checkpoints.save(self.state, manifest)

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

    def _gpu_metrics(self) -> dict[str, float]:
        """Operations per second of a GPU, their share of its peak where that is known, and memory."""
        layers = [None if a.kind == "full" else (a.block_size, a.top_k) for a in self.ready.schedule.stages[self.stage]]
        per_token = training_flops_per_token(self.config, self.ready.vocab_size, layers)
        flops = per_token * self.config.tokens_per_step / self.seconds[-1] / self.ready.world_size
        metrics = {"tflops": flops / 1e12}
        peak = peak_flops(torch.cuda.get_device_name()) if self.config.training.precision == "bf16" else None
        if peak:
            metrics["mfu"] = flops / peak
        return {**metrics, "peak_memory_bytes": torch.cuda.max_memory_allocated()}

    def _profiler(self, first_step: int) -> AbstractContextManager[Any]:
        """PyTorch's profiler for the chosen steps, one trace a rank in the run folder; else a stand-in that does
        nothing."""
        chosen = self.config.logging.profile_steps
        if not chosen or chosen[1] < first_step:
            return nullcontext(_NoProfiler())
        first, last = max(chosen[0], first_step), chosen[1]
        before = first - first_step
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.folder.profile.mkdir(parents=True, exist_ok=True)
        trace = self.folder.profile / f"rank_{torch.distributed.get_rank()}_steps_{first}_{last}.json"
        return torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(
                skip_first=max(before - 1, 0), wait=0, warmup=min(before, 1), active=last - first + 1, repeat=1
            ),
            on_trace_ready=lambda profile: profile.export_chrome_trace(str(trace)),
        )


class _NoProfiler:
    def step(self) -> None:
        """Nothing is recorded."""


def evaluation_is_due(config: Config, step: int) -> bool:
    """Whether a run that has validation data evaluates itself after this step."""
    return _due(config.evaluation.every, step) or step == config.training.steps


def _due(every: int | None, number: int) -> bool:
    return every is not None and number % every == 0


def _context_metrics(seen: Observation) -> dict[str, float]:
    """What this rank saw of context parallelism in a step: bytes received from other ranks, and under `dispatch` the
    load of the busiest rank over the mean, at its worst."""
    metrics: dict[str, float] = {"context_bytes": seen.total}
    loads = [load.most_after / load.mean for load in seen.loads if load.mean]
    return {**metrics, "dispatch_load": max(loads)} if loads else metrics
