"""Folders that appear when they are complete, and never in the place of another."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moba_megatron.config import ConfigError


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, beside `out`; it gets the name `out` in the end, and is removed if writing fails.

    Raises:
        ConfigError: there is something at `out` already.
    """
    check_unused(out)
    unfinished = out.with_name(f".{out.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_unused(out: Path) -> None:
    """Raises ConfigError if there is something at `out`: nothing is overwritten."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError([f"{out} exists and is not empty: nothing is overwritten, choose another folder"])
