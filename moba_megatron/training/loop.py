"""The training loop: steps, records, evaluations and checkpoints, until the horizon, a stop or a failure.

The order within one step is fixed, because resuming bit for bit depends on it: attention stage, optimizer step, record,
evaluation, checkpoint, stop. Evaluation draws no random numbers and changes no state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.timers import Timers

from moba_megatron.checkpoint import CheckpointWriter
from moba_megatron.config import Config
from moba_megatron.model.forward import Batch
from moba_megatron.training.faults import StopRequest
from moba_megatron.training.metrics import MetricsWriter
from moba_megatron.training.progress import ProgressView
from moba_megatron.training.run_folder import RunFolder
from moba_megatron.training.step import StepResult, TrainStep


@dataclass
class LoopParts:
    """What the loop is made of. `writer` is None on ranks that keep no records; `evaluate` is None without validation
    data.

    tokens_at: tokens that all steps up to a number have read.
    set_stage: makes the model attend as in a stage of the schedule (counted from 0).
    evaluate: runs an evaluation and returns a JSON-ready record.
    save: starts a checkpoint of the state after a number of finished steps.
    flops_per_token: training operations per token in a stage; peak_flops: of all devices together, None if unknown.
    """

    config: Config
    folder: RunFolder
    step: TrainStep
    batches: list[Iterator[Batch]]
    tokens_at: Callable[[int], int]
    stage_at: Callable[[int], int]
    set_stage: Callable[[int], None]
    evaluate: Callable[[], dict[str, Any]] | None
    checkpoints: CheckpointWriter
    save: Callable[[int], None]
    progress: ProgressView
    writer: MetricsWriter | None
    flops_per_token: Callable[[int], float]
    peak_flops: float | None
    device: torch.device
    timers: Timers


@dataclass
class LoopEnd:
    """After which step the loop ended, and the signal that stopped it, if one did."""

    step: int
    signal: str | None


def run_loop(parts: LoopParts, first_step: int, evaluate_first: bool = False) -> LoopEnd:
    """Train from `first_step` (from 1) to the horizon or `training.stop_after`. The last state is always saved.

    Args:
        evaluate_first: evaluate the step before `first_step`.
    """
    config = parts.config
    last_step = min(config.training.steps, config.training.stop_after or config.training.steps)
    stage, saved, signal = -1, first_step - 1, None
    seconds: list[float] = []
    number = first_step - 1
    with StopRequest() as stop, parts.progress, _profiler(parts, first_step) as profiler:
        if evaluate_first:
            stage = parts.stage_at(number)
            parts.set_stage(stage)
            _evaluate(parts, number)
        for number in range(first_step, last_step + 1):
            started = time.perf_counter()
            if parts.stage_at(number) != stage:
                stage = parts.stage_at(number)
                parts.set_stage(stage)
            result = parts.step(parts.batches, number)
            seconds.append(time.perf_counter() - started)
            _record(parts, number, stage, result, seconds, last_step)
            profiler.step()
            signal = stop.agreed(parts.device)
            evaluate = parts.evaluate and evaluation_is_due(config, number)
            if evaluate and signal is None:
                _evaluate(parts, number)
            if signal is not None or number == last_step or _due(config.checkpoint.every, number):
                parts.save(number)
                saved = number
            else:
                parts.checkpoints.poll()
            if signal is not None:
                # The state first: whoever sent the signal may not wait for long.
                parts.checkpoints.wait()
                if evaluate:
                    _evaluate(parts, number)
                break
        parts.checkpoints.wait()
    assert saved == number, "the last state is on disk"
    return LoopEnd(number, signal)


def evaluation_is_due(config: Config, step: int) -> bool:
    """Whether a run that has validation data evaluates itself after this step."""
    return _due(config.evaluation.every, step) or step == config.training.steps


def _due(every: int | None, number: int) -> bool:
    return every is not None and number % every == 0


def _record(
    parts: LoopParts, number: int, stage: int, result: StepResult, seconds: list[float], last_step: int
) -> None:
    tokens = parts.config.tokens_per_step
    values: dict[str, Any] = {
        "step": number,
        "tokens": parts.tokens_at(number),
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "step_seconds": seconds[-1],
        "forward_backward_seconds": parts.timers("forward-backward").elapsed(reset=True),
        "optimizer_seconds": parts.timers("optimizer").elapsed(reset=True),
        "tokens_per_second": tokens / seconds[-1],
        "stage": stage,
        **result.context,
    }
    if parts.device.type == "cuda":
        flops = parts.flops_per_token(stage) * values["tokens_per_second"]
        values["tflops"] = flops / torch.distributed.get_world_size() / 1e12
        if parts.peak_flops:
            values["mfu"] = flops / parts.peak_flops
        values["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
    if parts.writer:
        parts.writer.step(values)
    recent = sorted(seconds[-20:])
    parts.progress.step(values, seconds_left=(last_step - number) * recent[len(recent) // 2])


def _evaluate(parts: LoopParts, number: int) -> None:
    record = {"step": number, "tokens": parts.tokens_at(number), **parts.evaluate()}
    if parts.writer:
        parts.writer.evaluation(record)
    trailing = "" if record["trailing_loss"] is None else f"  trailing loss {record['trailing_loss']:.4f}"
    parts.progress.say(f"validation after step {number}  loss {record['loss']:.4f}{trailing}")


class _NoProfiler:
    def step(self) -> None:
        """Nothing is recorded."""


def _profiler(parts: LoopParts, first_step: int) -> AbstractContextManager[Any]:
    """PyTorch's profiler for the chosen steps, one trace a rank in the run folder; else a stand-in that does
    nothing."""
    chosen = parts.config.logging.profile_steps
    if not chosen or chosen[1] < first_step:
        return nullcontext(_NoProfiler())
    first, last = max(chosen[0], first_step), chosen[1]
    before = first - first_step
    activities = [torch.profiler.ProfilerActivity.CPU]
    if parts.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    parts.folder.profile.mkdir(parents=True, exist_ok=True)
    trace = parts.folder.profile / f"rank_{torch.distributed.get_rank()}_steps_{first}_{last}.json"
    return torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(
            skip_first=max(before - 1, 0), wait=0, warmup=min(before, 1), active=last - first + 1, repeat=1
        ),
        on_trace_ready=lambda profile: profile.export_chrome_trace(str(trace)),
    )
