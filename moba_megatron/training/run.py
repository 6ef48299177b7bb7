"""A training run from configuration to result: all parts are built here, each after those that it needs."""

from __future__ import annotations

import os
import socket
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moba_megatron.checkpoint import CheckpointError, TrainingState, load_training
from moba_megatron.config import Config
from moba_megatron.convert.initial import load_initial_weights
from moba_megatron.convert.run_inputs import keep_tokenizer
from moba_megatron.data.datasets import build_datasets, training_tokenizer
from moba_megatron.data.packing_report import packing_lines
from moba_megatron.model.builder import build_model
from moba_megatron.model.exchange_choice import resolve_exchange
from moba_megatron.platform.processes import one_line
from moba_megatron.platform.start import start_rank
from moba_megatron.runs.claim import check_shared, claimed
from moba_megatron.runs.disk import disk_error_line
from moba_megatron.runs.folder import RunFolder
from moba_megatron.runs.metrics import MetricsWriter
from moba_megatron.training.optimizer import build_optimizer, build_scheduler, wrap_data_parallel
from moba_megatron.training.plots import plot_run
from moba_megatron.training.preflight import Preflight, preflight_again
from moba_megatron.training.progress import ProgressView
from moba_megatron.training.replay import replay
from moba_megatron.training.trainer import LoopEnd, Trainer, evaluation_is_due
from moba_megatron.training.watch import Watch


@dataclass
class Outcome:
    """How a run ended: `finished`, `stopped` by a signal, or `paused` at `training.stop_after`."""

    state: str
    step: int
    signal: str | None
    folder: Path


def train(config: Config, ready: Preflight) -> Outcome:
    """Train as one rank. The process groups are left open: the caller ends them or the process."""
    levels = resolve_exchange(config).levels
    device = start_rank(config.parallel, seed=config.run.seed, threads=config.run.threads, context_levels=levels)
    rank = torch.distributed.get_rank()
    if config.training.replay is not None:
        _agree_on_resume(ready)
        return _replay(config, ready, device, rank)
    with claimed(config.run.dir) if rank == 0 else nullcontext() as claim:
        check_shared(config.run.dir, claim)
        # Who held the folder until now may have added a checkpoint.
        ready = preflight_again(config, ready)
        _agree_on_resume(ready)
        return _train(config, ready, device, rank)


def _train(config: Config, ready: Preflight, device: torch.device, rank: int) -> Outcome:
    folder = RunFolder(config.run.dir)
    state, wrapped = _build(config, ready)
    if ready.resume:
        load_training(ready.resume, state, config.parallel.model_dump(), check_files=config.checkpoint.verify)
    first_step = ready.position.step + 1
    datasets = build_datasets(config, ready.position.order_length(config))
    progress = ProgressView(
        total=config.training.steps, start=first_step - 1, every=config.logging.every, shown=rank == 0
    )
    if rank == 0:
        packing = packing_lines(*datasets)
        keep_tokenizer(training_tokenizer(config), folder, first_step - 1)
        folder.write_config(config, first_step - 1, [*ready.choices, *packing])
        folder.write_status("running", first_step - 1, **_process(), **_data_changes(ready))
        _introduce(progress, config, ready, wrapped, packing)
    missed = _evaluation_was_missed(config, folder, ready)
    if first_step > config.training.steps and not missed:
        return _conclude(config, ready, folder, progress, LoopEnd(config.training.steps, None), rank)
    writer = MetricsWriter(folder, config, first_step - 1) if rank == 0 else None
    for line in writer.gaps if writer else []:
        progress.say(line)
    running = partial(folder.write_status, "running", **_process(), **_data_changes(ready)) if rank == 0 else None
    with Watch(config.run.stall_seconds, running) as watch:
        trainer = Trainer(config, ready, state, wrapped, *datasets, progress, writer, device, watch=watch)
        end = trainer.train(first_step, evaluate_first=missed)
    if writer:
        writer.close()
    return _conclude(config, ready, folder, progress, end, rank)


def _replay(config: Config, ready: Preflight, device: torch.device, rank: int) -> Outcome:
    """Look at one step again. The run's folder stays as it is, but for the report: another process may train there."""
    folder, step = RunFolder(config.run.dir), config.training.replay
    state, wrapped = _build(config, ready)
    if ready.resume:
        load_training(ready.resume, state, config.parallel.model_dump(), check_files=config.checkpoint.verify)
    train_data, _ = build_datasets(config, ready.position.order_length(config))
    progress = ProgressView(total=step, start=ready.position.step, every=config.logging.every, shown=rank == 0)
    trainer = Trainer(config, ready, state, wrapped, train_data, None, progress, None, device, keeps=False)
    replay(trainer, step)
    torch.distributed.barrier()
    return Outcome("replayed", step, None, folder.path)


def _evaluation_was_missed(config: Config, folder: RunFolder, ready: Preflight) -> bool:
    """Whether the run was killed between the checkpoint it resumes from and the evaluation after that step, as rank 0
    sees it."""
    step = ready.position.step
    own = ready.resume is not None and ready.resume.parent.resolve() == folder.checkpoints.resolve()
    wanted = own and config.data.validation is not None and evaluation_is_due(config, step)
    missed = [wanted and not folder.evaluated(step)]
    torch.distributed.broadcast_object_list(missed, src=0)
    return missed[0]


def _agree_on_resume(ready: Preflight) -> None:
    """Raise if the ranks see different checkpoints, as over a network disk that lags."""
    seen: list[str] = [""] * ready.world_size
    torch.distributed.all_gather_object(seen, str(ready.resume))
    if len(set(seen)) > 1:
        raise CheckpointError(f"the ranks found different checkpoints: {sorted(set(seen))}. Start again")


def _build(config: Config, ready: Preflight) -> tuple[TrainingState, list[Any]]:
    chunks = build_model(config, ready.vocab_size, ready.schedule)
    if config.model.init_from and not ready.resume:
        load_initial_weights(config, ready.vocab_size, chunks)
    wrapped = wrap_data_parallel(chunks, config)
    optimizer = build_optimizer(wrapped, config)
    return TrainingState(chunks, optimizer, build_scheduler(optimizer, config)), wrapped


def _introduce(
    progress: ProgressView, config: Config, ready: Preflight, wrapped: list[Any], packing: list[str]
) -> None:
    local = sum(parameter.numel() for chunk in wrapped for parameter in chunk.parameters())
    progress.say(f"run folder {config.run.dir}: " + (f"resuming from {ready.resume}" if ready.resume else "new run"))
    progress.say(ready.weights)
    progress.say(
        f"{local:,} parameters on this rank, {ready.world_size} processes ({ready.data_parallel} data-parallel), "
        f"{config.tokens_per_step:,} tokens a step"
    )
    for line in [*ready.choices, *packing, *ready.schedule.table(config.training.steps).splitlines()]:
        progress.say(line)


def _process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname()}


def _data_changes(ready: Preflight) -> dict[str, Any]:
    """For the status: where the run's data changed, if they did."""
    return {"data_changes": list(ready.position.changes)} if ready.position.changes else {}


def _conclude(
    config: Config, ready: Preflight, folder: RunFolder, progress: ProgressView, end: LoopEnd, rank: int
) -> Outcome:
    """Draw plots, write the status, and print the results and the command to continue."""
    state = "finished" if end.step == config.training.steps else "stopped" if end.signal else "paused"
    if rank == 0:
        plots, problem = _draw(folder)
        folder.write_status(state, end.step, signal=end.signal, **_data_changes(ready), **problem)
        why = {"paused": "paused at training.stop_after", "stopped": f"stopped by {end.signal}"}.get(state, state)
        progress.say(f"{why} after step {end.step} of {config.training.steps}")
        for path in [folder.metrics, *plots]:
            progress.say(f"  {path}")
        for text in problem.values():
            progress.say(f"  no plots: {text}")
        if state != "finished":
            more = {"paused": " without training.stop_after"}.get(state, "")
            if config.checkpoint.resume == "never":
                more += " with checkpoint.resume=auto"
            progress.say(f"  to continue: the same command{more} (checkpoint {folder.checkpoints}/step_{end.step})")
    torch.distributed.barrier()
    return Outcome(state, end.step, end.signal, folder.path)


def _draw(folder: RunFolder) -> tuple[list[Path], dict[str, str]]:
    """The pictures, and for the status what went wrong with them: they do not decide how a run ended."""
    try:
        return plot_run(folder), {}
    except Exception as error:  # whatever matplotlib, the fonts or the disk have to say
        return [], {"plots": disk_error_line(error, folder.plots) or one_line(error)}
