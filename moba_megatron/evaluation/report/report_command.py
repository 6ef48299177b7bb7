"""`moba-megatron report`: the page of a run, or of several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moba_megatron.errors import user_errors


@user_errors()
def report_command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are compared.")],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The page to write. Default: RUN/report.html; for several runs comparison.html in the first."
        ),
    ] = None,
) -> None:
    """Make a page of a run that is running, stopped or failed: loss and learning rate, loss by position, routing,
    tasks, throughput, configuration and environment.

    The page includes the results of `moba-megatron evaluate`. Run that first for loss by position under both kinds of
    attention (default), routing (--routing) and tasks (--tasks).
    """
    from moba_megatron.evaluation.report.run_page import distinct, report_page
    from moba_megatron.evaluation.report.run_view import view_run

    views = distinct([view_run(folder) for folder in runs])
    path = output or runs[0] / ("report.html" if len(runs) == 1 else "comparison.html")
    _refuse_foreign(path)
    page = report_page(views)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    typer.echo(f"  {path}")


def _refuse_foreign(path: Path) -> None:
    from moba_megatron.evaluation.report.page import MARK

    if path.is_dir():
        raise ValueError(f"--output {path} is a folder: name a file in it")
    if path.exists() and MARK not in path.read_text(errors="replace", encoding="utf-8")[:200]:
        raise ValueError(f"--output {path} is there and is not a report: name another file")
