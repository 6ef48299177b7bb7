"""The progress bar of `prepare`: parts done, text per second, time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def encoding_progress(
    console: Console, all_sizes: list[int], todo_sizes: list[int]
) -> Iterator[Callable[[int, int], None]]:
    """A bar over the bytes of all parts, those of earlier runs counted as done.

    Yields:
        advance(part_bytes, text_bytes): to be called when a part is done. The rate shown is text (UTF-8 bytes) over
        time.
    """
    columns = (
        TextColumn("encoding"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # Streams do not know their size: then the bar counts parts.
    unit = 0 if all(all_sizes) else 1
    weights = sum(size or unit for size in all_sizes), sum(size or unit for size in todo_sizes)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=weights[0], completed=weights[0] - weights[1], rate="")
        begin, text_total = time.monotonic(), 0

        def advance(part_bytes: int, text_bytes: int) -> None:
            nonlocal text_total
            text_total += text_bytes
            rate = text_total / 1e6 / max(time.monotonic() - begin, 1e-9)
            progress.update(task, advance=part_bytes or unit, rate=f"{text_total / 1e6:,.1f} MB, {rate:,.1f} MB/s")

        yield advance
