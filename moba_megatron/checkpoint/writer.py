"""Writing checkpoints while training goes on.

A save copies nothing on CPU: megatron-core's asynchronous saver forks a process that sees the state as it was, writes
this rank's files and their digests, and ends. When every rank's process is done, all ranks finalize together: rank 0
writes the manifest, flushes everything to disk and renames `.step_N.partial` to `step_N`; only then are older
checkpoints removed. A run killed at any moment leaves either the old set or the new one.

The writer also checks all values. If the state of any rank is not finite, the checkpoint is not published: no training
could continue from it, and it would displace good checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from torch.distributed.checkpoint import CheckpointException

from moba_megatron.checkpoint.finite import list_of_names, not_finite, written_tensors
from moba_megatron.checkpoint.manifest import (
    CheckpointError,
    Manifest,
    NotFinite,
    SaveError,
    digest_file,
    list_checkpoints,
)
from moba_megatron.checkpoint.state import SHARDING, TrainingState
from moba_megatron.platform.megatron_core import save_arguments
from moba_megatron.platform.processes import die_with_parent, forks_die_meanwhile
from moba_megatron.runs.disk import disk_error_line, free_text


class CheckpointWriter:
    """Writes `DIRECTORY/step_N`, one save at a time, and keeps the newest `keep` of them.

    Every method is collective: all ranks call it at the same step.
    """

    def __init__(self, directory: Path, *, keep: int, asynchronous: bool):
        self.directory = directory
        self.keep = keep
        self.asynchronous = asynchronous
        self.queue = AsyncCallsQueue()
        self.discard()

    def discard(self) -> None:
        """Remove what an unfinished save or removal left. Nothing may be being written."""
        if torch.distributed.get_rank() == 0:
            for leftover in [*self.directory.glob(".step_*.partial"), *self.directory.glob(".step_*.removed")]:
                shutil.rmtree(leftover)
        torch.distributed.barrier()

    def save(self, state: TrainingState, manifest: Manifest) -> Path:
        """Start writing; waits for the previous save first. Returns the path the checkpoint will have.

        Raises:
            SaveError: on every rank, if this save or the previous one could not be written.
        """
        self.wait()
        final = self.directory / f"step_{manifest.step}"
        unfinished = self.directory / f".step_{manifest.step}.partial"
        _on_first_rank(lambda: unfinished.mkdir(parents=True), unfinished)
        with _one_rank_alone_says_why(unfinished):
            request = dist_checkpointing.save(
                state.sharded(loading=False),
                str(unfinished),
                async_sharded_save=True,
                content_metadata=SHARDING,
                **save_arguments(),
            )
        write = partial(_write_and_digest, request.async_fn, unfinished, forked=self.asynchronous)
        request = request._replace(async_fn=write)
        request.add_finalize_fn(partial(self._publish, unfinished, final, manifest))
        self._start(request)
        return final

    def poll(self) -> None:
        """Publish a finished save, if there is one. Raises as `save`."""
        self._finalize(blocking=False)

    def wait(self) -> None:
        """Wait until nothing is being written. Raises as `save`."""
        self._finalize(blocking=True)

    def _finalize(self, blocking: bool) -> None:
        with _written_or_save_error(self.directory):
            self.queue.maybe_finalize_async_calls(blocking=blocking)

    def _start(self, request: AsyncRequest) -> None:
        if self.asynchronous:
            self.queue.schedule_async_request(request)
        else:
            with _written_or_save_error(self.directory):
                request.execute_sync()

    def _publish(self, unfinished: Path, final: Path, manifest: Manifest) -> None:
        """Give a written checkpoint its name. All ranks raise what rank 0 finds wrong with it.

        Raises:
            NotFinite: what was written is not finite; it is removed.
            SaveError: it is not whole, as on a full disk; it is removed.
        """

        def act() -> None:
            try:
                self._complete(unfinished, manifest)
                self._replace(unfinished, final)
            except (CheckpointError, OSError):
                shutil.rmtree(unfinished, ignore_errors=True)
                raise

        _on_first_rank(act, unfinished)

    def _complete(self, unfinished: Path, manifest: Manifest) -> None:
        """Write the manifest, with what all ranks say of their files."""
        self._collect_reports(unfinished, manifest)
        small = [path for path in unfinished.iterdir() if path.name not in manifest.files]
        manifest.files.update({path.name: digest_file(path) for path in small})
        manifest.write(unfinished)

    def _replace(self, unfinished: Path, final: Path) -> None:
        for path in unfinished.iterdir():
            _flush(path)
        if final.exists():
            _remove(final)
        unfinished.rename(final)
        _flush(self.directory)
        for old in list_checkpoints(self.directory)[: -self.keep]:
            _remove(old)

    def _collect_reports(self, unfinished: Path, manifest: Manifest) -> None:
        parts = sorted(unfinished.glob("digests_*.json"))
        if len(parts) != torch.distributed.get_world_size():
            raise SaveError(
                f"{unfinished}: {len(parts)} of {torch.distributed.get_world_size()} ranks finished writing. Is the "
                "disk full? The checkpoints before it are untouched"
            )
        names: set[str] = set()
        tensors = 0
        for part in parts:
            report = json.loads(part.read_text(encoding="utf-8"))
            manifest.files.update(report["files"])
            names |= set(report["not_finite"])
            tensors += report["tensors"]
            part.unlink()
        if not tensors:
            raise CheckpointError(f"{unfinished}: megatron-core wrote no tensor that a rank could check")
        if names:
            raise NotFinite(
                f"step {manifest.step} is not saved: values are not finite (infinite, NaN, or weights over 1.8e19) in "
                f"{list_of_names(sorted(names))}. The checkpoints before it are untouched. Lower optimizer.lr, "
                "lengthen optimizer.warmup_steps, or look at the data of the last steps",
                step=manifest.step,
            )


def _write_and_digest(write: Callable[..., Any] | None, folder: Path, *args: Any, forked: bool, **kwargs: Any) -> None:
    """Write this rank's files, then record beside them their digests and which tensors are not finite; in a forked
    process of its own if asynchronous."""
    rank = torch.distributed.get_rank()
    if forked:
        die_with_parent()
        # The threads of the process that was forked are not here.
        torch.set_num_threads(1)
    # megatron-core writes in processes of its own, which would wait for this one for ever.
    with forks_die_meanwhile():
        if write is not None:
            write(*args, **kwargs)
    tensors = list(written_tensors([args, list(kwargs.values())]))
    report = {
        "files": {path.name: digest_file(path) for path in folder.glob(f"__{rank}_*.distcp")},
        "tensors": len(tensors),
        "not_finite": not_finite(tensors),
    }
    whole = folder / f"digests_{rank}.json"
    unfinished = folder / f".digests_{rank}.tmp"
    # Without its report a rank has not finished writing, which rank 0 tells all.
    with contextlib.suppress(OSError):
        unfinished.write_text(json.dumps(report), encoding="utf-8")
        os.replace(unfinished, whole)


def _on_first_rank(act: Callable[[], object], folder: Path) -> None:
    """Let rank 0 do something while the others wait for it.

    Raises:
        SaveError: on all ranks, if rank 0 could not.
        CheckpointError: on all ranks, another one that it raised.
    """
    problem: list[CheckpointError | None] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            act()
        except CheckpointError as error:
            problem = [error]
        except OSError as error:
            problem = [SaveError(disk_error_line(error, folder) or f"{folder}: {error}")]
    torch.distributed.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise problem[0]


@contextmanager
def _written_or_save_error(directory: Path) -> Iterator[None]:
    """megatron-core's own exception, which it raises on all ranks, as SaveError; what went wrong is on rank 0 alone."""
    try:
        yield
    except CheckpointException as error:
        causes = [failure[0] for failure in error.failures.values()]
        lines = [line for cause in causes if (line := disk_error_line(cause, directory))]
        said: list[str] = [(lines or [f"{directory}: {cause}; {free_text(directory)}" for cause in causes] or [""])[0]]
        torch.distributed.broadcast_object_list(said, src=0)
        raise SaveError(said[0]) from error


@contextmanager
def _one_rank_alone_says_why(folder: Path) -> Iterator[None]:
    """What rank 0 writes before the others begin ends the job where there are others: they wait for it."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if torch.distributed.get_world_size() > 1 or isinstance(error, torch.distributed.DistError):
            raise
        raise SaveError(disk_error_line(error, folder) or f"{folder}: {error}; {free_text(folder)}") from error


def _flush(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that no moment shows a half-removed one under its name."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)
