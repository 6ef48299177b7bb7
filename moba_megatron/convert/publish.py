"""Folders that appear when they are complete, and never in the place of another."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moba_megatron.config import ConfigError
from moba_megatron.runs.files import Held, hold


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, beside `out`; it gets the name `out` in the end, and is removed if writing fails.

    Raises:
        ConfigError: there is something at `out` already, or another process is writing it.
    """
    check_unused(out)
    unfinished, lock = (out.with_name(f".{out.name}.{ending}") for ending in ("partial", "lock"))
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with hold(lock):
            try:
                # What another one has finished meanwhile stays.
                check_unused(out)
                # Left by a process that was killed.
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                yield unfinished
                unfinished.rename(out)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
                lock.unlink(missing_ok=True)
    except Held as held:
        raise ConfigError([f"{out} is being written by {held.holder}: wait for it, or choose another folder"]) from held


def check_unused(out: Path) -> None:
    """Raises ConfigError if there is something at `out`: nothing is overwritten."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError([f"{out} exists and is not empty: nothing is overwritten, choose another folder"])
