"""A process that is killed while it saves leaves no writer behind, whether it saves in the background or not."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks
from small_run import small_config, train_here

from moba_megatron.convert.export_hf import export_huggingface
from moba_megatron.convert.exported import open_exported
from moba_megatron.convert.import_hf import import_huggingface


def with_slow_writers(pids: Path, work: Callable[..., Any], *args: Any) -> None:
    """Call `work`; whoever writes a file of a checkpoint writes its process's number down and sleeps."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    def sleep(*_: Any, **__: Any) -> None:
        note(pids)
        time.sleep(300)

    note(pids)
    FileSystemWriterAsync.write_preloaded_data = staticmethod(sleep)
    work(*args)


def note(pids: Path) -> None:
    with pids.open("a") as stream:
        stream.write(f"{os.getpid()}\n")


def lives(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_while_it_writes(pids: Path, writers: int, work: Callable[..., Any], *args: Any, prepare: bool = True) -> None:
    def run() -> None:
        with suppress(AssertionError):
            run_ranks(1, with_slow_writers, pids, work, *args, prepare=prepare)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    try:
        deadline = time.monotonic() + 60
        while len(found := [int(line) for line in pids.read_text().split()] if pids.exists() else []) <= writers:
            assert time.monotonic() < deadline, f"{found}: nobody writes"
            time.sleep(0.05)
        os.kill(found[0], signal.SIGKILL)
        deadline = time.monotonic() + 10
        while left := [pid for pid in found if lives(pid)]:
            assert time.monotonic() < deadline, f"{left} of {found} live on"
            time.sleep(0.05)
    finally:
        for pid in [int(line) for line in pids.read_text().split()] if pids.exists() else []:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.join(30)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_writer_outlives_its_rank(tmp_path, asynchronous):
    config = small_config(
        tmp_path, training__steps=4, checkpoint__every=1, checkpoint__asynchronous=asynchronous, checkpoint__keep=1
    )
    kill_while_it_writes(tmp_path / "pids", 1, train_here, config)


def test_no_writer_outlives_an_import(tmp_path):
    config = small_config(tmp_path, training__steps=4, training__stop_after=1)
    run_ranks(1, train_here, config)
    export_huggingface(open_exported(config.run.dir), tmp_path / "model")
    kill_while_it_writes(
        tmp_path / "pids", 1, import_huggingface, tmp_path / "model", tmp_path / "imported", prepare=False
    )
    assert not (tmp_path / "imported").exists()
