"""How far an evaluation is: a bar on a terminal, a line twice a minute elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

SECONDS = 30
T = TypeVar("T")


def shown(batches: Iterator[T], total: int, what: str, console: Console, at_once: int = 1) -> Iterator[T]:
    """The batches, with the number of samples shown as they are taken.

    Args:
        total: samples in all.
        at_once: samples that all ranks together take with one batch.
    """
    if console.is_terminal:
        passes = -(-total // at_once)
        yield from track(batches, description=what, total=passes, console=console, transient=True)
        return
    last = time.monotonic()
    for number, batch in enumerate(batches):
        if time.monotonic() - last > SECONDS:
            last = time.monotonic()
            console.print(f"{what}: {number * at_once} of {total} samples")
        yield batch
