"""The progress bar of `prepare`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from moba_megatron.corpus.encode import Progress as EncodingProgress


class _Rate(ProgressColumn):
    """Text taken so far and per second."""

    def __init__(self, progress: EncodingProgress):
        super().__init__()
        self.progress, self.begin = progress, time.monotonic()

    def render(self, task: Task) -> Text:
        megabytes = self.progress.text.value / 1e6
        return Text(f"{megabytes:,.1f} MB, {megabytes / max(time.monotonic() - self.begin, 1e-9):,.1f} MB/s")


class _Bar(Progress):
    """Looks at what the workers have done whenever it is drawn, so that it moves inside large parts too."""

    def __init__(self, *columns: ProgressColumn, look: Callable[[], int] | None, **more: Any):
        self._look = look
        super().__init__(*columns, **more)

    def get_renderables(self) -> Iterable[RenderableType]:
        if self._look is not None:
            for task in self.tasks:
                self.update(task.id, completed=self._look())
        yield from super().get_renderables()


@contextmanager
def encoding_progress(
    console: Console, all_sizes: list[int], todo_sizes: list[int], progress: EncodingProgress
) -> Iterator[Callable[[], None]]:
    """A bar over the bytes of all parts, those of earlier runs counted as done.

    Args:
        progress: what the workers have done so far.

    Yields:
        part_done(): to be called when a part is done.
    """
    columns = (
        TextColumn("encoding"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        _Rate(progress),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    # Streams do not know their size: then the bar counts parts.
    if not all(all_sizes):
        with _Bar(*columns, look=None, console=console) as bar:
            task = bar.add_task("", total=len(all_sizes), completed=len(all_sizes) - len(todo_sizes))
            yield lambda: bar.advance(task)
        return
    before = sum(all_sizes) - sum(todo_sizes)
    with _Bar(*columns, look=lambda: before + progress.input.value, console=console) as bar:
        bar.add_task("", total=sum(all_sizes))
        yield lambda: None
