"""Options of `moba-megatron evaluate` for the synthetic tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

if TYPE_CHECKING:
    from moba_megatron.evaluation.tasks.options import TaskOptions


@dataclass(frozen=True)
class TasksFlags:
    """Options of the command line."""

    TITLE: ClassVar[str] = "Tasks"

    tasks: Annotated[
        str | None,
        typer.Option(help="Synthetic long-range tasks, separated by commas, such as needle,multi_key; or all."),
    ] = None
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of the tasks' samples (1024,8K,...). Default: data.sequence_length of the run and its halves."
        ),
    ] = None
    depths: Annotated[str, typer.Option(help="Where the statement with the answer stands, 0 (start) to 1 (end).")] = (
        "0,0.25,0.5,0.75,1"
    )
    task_samples: Annotated[int, typer.Option(min=1, help="Samples of each task, length and depth.")] = 10

    def options(self, haystack: str | None) -> TaskOptions | None:
        """The tasks, None if there are none.

        Raises:
            ValueError: an unknown task, a wrong length or depth, or lengths without tasks.
        """
        from moba_megatron.evaluation.tasks.options import task_options

        if self.tasks is not None:
            asked = {"lengths": self.lengths, "depths": self.depths, "samples": self.task_samples}
            return task_options(self.tasks, **asked, haystack=haystack)
        if self.lengths is not None:
            raise ValueError(f"--lengths {self.lengths} without --tasks: name the tasks to run")
        return None
