"""The display during a run: a bar with loss, speed and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressView:
    """Shown by one rank; silent on the others (`shown=False`)."""

    def __init__(self, *, total: int, start: int, every: int, shown: bool, console: Console | None = None):
        self.every = every
        self.total = total
        self.shown = shown
        self.console = console or Console(soft_wrap=True, highlight=False, quiet=not shown)
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (shown and self.console.is_terminal),
        )
        self.task = self.bar.add_task("train", total=total, completed=start, numbers="")

    def __enter__(self) -> ProgressView:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def step(self, values: dict[str, Any], seconds_left: float) -> None:
        """Show one line of metrics. `seconds_left` serves plain lines, the bar has its own estimate."""
        numbers = f"loss {values['loss']:.4f}  {values['tokens_per_second']:,.0f} tokens/s"
        if "router_loss" in values:
            numbers = f"router loss {values['router_loss']:.4f}  {numbers}"
        self.bar.update(self.task, completed=values["step"], numbers=numbers)
        if self.shown and (values["step"] % self.every == 0 or values["step"] == self.total):
            self.say(
                f"step {values['step']:>{len(str(self.total))}}/{self.total}  {numbers}  "
                f"grad norm {values['grad_norm']:.3f}  lr {values['lr']:.2e}  {_duration(seconds_left)} left"
            )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
