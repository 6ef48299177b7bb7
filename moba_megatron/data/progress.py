"""The progress bar of `prepare`: parts done, text per second, time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import Synchronized

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(ProgressColumn):
    """Text taken so far and per second, also inside parts: a large compressed file is one part."""

    def __init__(self, text_bytes: Synchronized[int]):
        super().__init__()
        self.text_bytes, self.begin = text_bytes, time.monotonic()

    def render(self, task: Task) -> Text:
        megabytes = self.text_bytes.value / 1e6
        return Text(f"{megabytes:,.1f} MB, {megabytes / max(time.monotonic() - self.begin, 1e-9):,.1f} MB/s")


@contextmanager
def encoding_progress(
    console: Console, all_sizes: list[int], todo_sizes: list[int], text_bytes: Synchronized[int]
) -> Iterator[Callable[[int], None]]:
    """A bar over the bytes of all parts, those of earlier runs counted as done.

    Args:
        text_bytes: UTF-8 bytes of text that the workers have encoded so far.

    Yields:
        advance(part_bytes): to be called when a part is done.
    """
    columns = (
        TextColumn("encoding"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        _Rate(text_bytes),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # Streams do not know their size: then the bar counts parts.
    unit = 0 if all(all_sizes) else 1
    weights = sum(size or unit for size in all_sizes), sum(size or unit for size in todo_sizes)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=weights[0], completed=weights[0] - weights[1])
        yield lambda part_bytes: progress.update(task, advance=part_bytes or unit)
