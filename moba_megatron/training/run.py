"""A training run from configuration to result: everything is built here, in the order in which it depends on each
other."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.timers import Timers

from moba_megatron import __version__, platform
from moba_megatron.checkpoint import CheckpointWriter, Manifest, TrainingState, load_training
from moba_megatron.config import Config, ConfigError, check_world
from moba_megatron.data.batches import Batch
from moba_megatron.data.datasets import DataSummary, build_datasets, check_data
from moba_megatron.data.feed import rank_batches
from moba_megatron.evaluation.positions import evaluate
from moba_megatron.model.builder import build_model
from moba_megatron.model.core_attention import set_attention_stage
from moba_megatron.model.schedule import AttentionSchedule
from moba_megatron.ops.backends import resolve_backend
from moba_megatron.planning.flops import peak_flops, training_flops_per_token
from moba_megatron.platform.start import start_rank
from moba_megatron.training.loop import LoopEnd, LoopParts, run_loop
from moba_megatron.training.metrics import MetricsWriter
from moba_megatron.training.optimizer import build_optimizer, build_scheduler, wrap_data_parallel
from moba_megatron.training.plots import plot_run
from moba_megatron.training.progress import ProgressView
from moba_megatron.training.run_folder import RunFolder, find_resume
from moba_megatron.training.step import TrainStep


@dataclass(frozen=True)
class Preflight:
    """What is known before any process group starts."""

    world_size: int
    data_parallel: int
    resume: Path | None
    data: DataSummary
    choices: list[str]
    """What every `auto` became, and why: one line each."""

    def vocab_size(self, config: Config) -> int:
        return config.model.vocab_size or self.data.vocab_size


def preflight(config: Config, world_size: int) -> Preflight:
    """Every check that needs no process group.

    Raises:
        ConfigError: sizes that do not fit the processes, data or checkpoint that cannot be used, a missing library.
    """
    data_parallel = check_world(config, world_size)
    if config.logging.wandb != "off" and importlib.util.find_spec("wandb") is None:
        raise ConfigError([f"logging.wandb = {config.logging.wandb}: wandb is not installed (pip install wandb)"])
    try:
        backend, reason = resolve_backend(config.attention.backend, platform.current_device())
    except ValueError as error:
        raise ConfigError([f"attention.backend = {config.attention.backend}: {error}"]) from error
    choices = [f"attention.backend = {config.attention.backend}: {backend} ({reason})"]
    return Preflight(world_size, data_parallel, find_resume(config), check_data(config), choices)


@dataclass
class Outcome:
    """How a run ended: `finished`, `stopped` by a signal, or `paused` at `training.stop_after`."""

    state: str
    step: int
    signal: str | None
    folder: Path


def train(config: Config, ready: Preflight) -> Outcome:
    """Train as one rank. The process groups are left open: the caller ends them or the process."""
    device = start_rank(config.parallel, seed=config.run.seed, threads=config.run.threads)
    rank = torch.distributed.get_rank()
    folder = RunFolder(config.run.dir)
    schedule = AttentionSchedule.from_config(config.attention, config.model.num_layers)
    state, wrapped = _build(config, ready.vocab_size(config), schedule)
    first_step = 1
    if ready.resume:
        manifest = load_training(
            ready.resume, state, config.parallel.model_dump(), check_files=config.checkpoint.verify
        )
        first_step = manifest.step + 1
    progress = ProgressView(
        total=config.training.steps, start=first_step - 1, every=config.logging.every, shown=rank == 0
    )
    if rank == 0:
        folder.write_config(config, first_step - 1, ready.choices)
        folder.write_status("running", first_step - 1, pid=os.getpid())
        _introduce(progress, config, ready, schedule, wrapped)
    if first_step > config.training.steps:
        return _conclude(config, folder, progress, LoopEnd(config.training.steps, None), rank)
    writer = MetricsWriter(folder.path, config, first_step - 1) if rank == 0 else None
    parts = _loop_parts(config, ready, folder, schedule, state, wrapped, progress, writer, device, first_step)
    end = run_loop(parts, first_step)
    if writer:
        writer.close()
    return _conclude(config, folder, progress, end, rank)


def _build(config: Config, vocab_size: int, schedule: AttentionSchedule) -> tuple[TrainingState, list[Any]]:
    chunks = build_model(config, vocab_size, schedule)
    wrapped = wrap_data_parallel(chunks, config)
    optimizer = build_optimizer(wrapped, config)
    return TrainingState(chunks, optimizer, build_scheduler(optimizer, config)), wrapped


def _loop_parts(
    config: Config,
    ready: Preflight,
    folder: RunFolder,
    schedule: AttentionSchedule,
    state: TrainingState,
    wrapped: list[Any],
    progress: ProgressView,
    writer: MetricsWriter | None,
    device: torch.device,
    first_step: int,
) -> LoopParts:
    training = config.training
    train_data, validation_data = build_datasets(config)
    timers = Timers(log_level=0, log_option="max")
    num_microbatches = training.global_batch_size // (training.micro_batch_size * ready.data_parallel)
    checkpoints = CheckpointWriter(
        folder.checkpoints, keep=config.checkpoint.keep, asynchronous=config.checkpoint.asynchronous
    )

    def feed(dataset: Any, consumed: int, samples: int) -> list[Iterator[Batch]]:
        which = {"eod_id": ready.data.eod_id, "consumed_samples": consumed, "num_samples": samples, "device": device}
        return [rank_batches(dataset, config, **which) for _ in wrapped]

    def save(step: int) -> None:
        checkpoints.save(state, _manifest(config, schedule, step))

    def run_evaluation() -> dict[str, Any]:
        passes = math.ceil(config.evaluation.samples / (training.micro_batch_size * ready.data_parallel))
        return evaluate(wrapped, feed(validation_data, 0, config.evaluation.samples), config, passes).to_dict()

    def flops_per_token(stage: int) -> float:
        layers = [None if a.kind == "full" else (a.block_size, a.top_k) for a in schedule.stages[stage]]
        return training_flops_per_token(config, ready.vocab_size(config), layers)

    one_device = peak_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    return LoopParts(
        config=config,
        folder=folder,
        step=TrainStep(wrapped, state.optimizer, state.scheduler, config, num_microbatches, timers),
        batches=feed(
            train_data, (first_step - 1) * training.global_batch_size, training.steps * training.global_batch_size
        ),
        stage_at=lambda step: schedule.stage_at(step, training.steps),
        set_stage=lambda stage: set_attention_stage(state.model, schedule, stage),
        evaluate=run_evaluation if validation_data is not None else None,
        checkpoints=checkpoints,
        save=save,
        progress=progress,
        writer=writer,
        flops_per_token=flops_per_token,
        peak_flops=one_device * ready.world_size if one_device else None,
        device=device,
        timers=timers,
    )


def _manifest(config: Config, schedule: AttentionSchedule, step: int) -> Manifest:
    libraries = ("torch", "megatron-core")
    return Manifest(
        step=step,
        consumed_samples=step * config.training.global_batch_size,
        config=config.model_dump(mode="json"),
        schedule=schedule.to_dict(),
        versions={"moba-megatron": __version__, **{name: importlib.metadata.version(name) for name in libraries}},
    )


def _introduce(
    progress: ProgressView, config: Config, ready: Preflight, schedule: AttentionSchedule, wrapped: list[Any]
) -> None:
    local = sum(parameter.numel() for chunk in wrapped for parameter in chunk.parameters())
    progress.say(f"run folder {config.run.dir}: " + (f"resuming from {ready.resume}" if ready.resume else "new run"))
    progress.say(
        f"{local:,} parameters on this rank, {ready.world_size} processes ({ready.data_parallel} data-parallel), "
        f"{config.tokens_per_step:,} tokens a step"
    )
    for line in [*ready.choices, *schedule.table(config.training.steps).splitlines()]:
        progress.say(line)


def _conclude(config: Config, folder: RunFolder, progress: ProgressView, end: LoopEnd, rank: int) -> Outcome:
    """Write status and plots, and say what there is and how to go on."""
    state = "finished" if end.step == config.training.steps else "stopped" if end.signal else "paused"
    if rank == 0:
        plots = plot_run(folder)
        why = {
            "finished": "finished",
            "paused": "paused at training.stop_after",
            "stopped": f"stopped by {end.signal}",
        }[state]
        progress.say(f"{why} after step {end.step} of {config.training.steps}")
        for path in [folder.metrics, *plots]:
            progress.say(f"  {path}")
        if state != "finished":
            again = "the same command" if state == "stopped" else "the same command without training.stop_after"
            progress.say(f"  to continue: {again} (checkpoint {folder.checkpoints}/step_{end.step})")
        folder.write_status(state, end.step, signal=end.signal)
    torch.distributed.barrier()
    return Outcome(state, end.step, end.signal, folder.path)
