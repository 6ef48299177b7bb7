"""How far an evaluation is: a bar on a terminal, a line twice a minute elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import track

from moba_megatron.model.forward import Batch

SECONDS = 30


def shown(batches: Iterator[Batch], total: int, what: str, console: Console) -> Iterator[Batch]:
    """The batches, with their number shown as they are taken."""
    if console.is_terminal:
        yield from track(batches, description=what, total=total, console=console, transient=True)
        return
    last = time.monotonic()
    for number, batch in enumerate(batches):
        if time.monotonic() - last > SECONDS:
            last = time.monotonic()
            console.print(f"{what}: {number} of {total} samples")
        yield batch
