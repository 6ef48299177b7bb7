"""`moba-megatron scaling`: sweeps of training runs from one YAML file."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from moba_megatron.config import ConfigError
from moba_megatron.scaling.laws import Laws, fit_sweep, left_out
from moba_megatron.scaling.results import Result, read_result, read_results
from moba_megatron.scaling.sweep import Point, Sweep, load_sweep
from moba_megatron.scaling.tables import Rows, gap_rows, law_rows, markdown, plan_rows, provenance, result_rows

scaling_app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

SweepArgument = Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="See docs/scaling.md.")]
OutputOption = Annotated[Path | None, typer.Option(help="Folder to write into. Default: the sweep's dir.")]


@scaling_app.callback()
def scaling() -> None:
    """Sweeps: a grid of training runs from one YAML file, the laws that they follow, and the report's figure 3."""


@scaling_app.command("plan")
def plan_command(sweep: SweepArgument) -> None:
    """List the runs with parameters, tokens, learning rate, operations, and how each stands."""
    with _errors():
        loaded = load_sweep(sweep)
        results = read_results(loaded)
        _print(plan_rows(loaded, results), f"{sweep}: runs in {loaded.folder}")
        total = sum(point.flops_true for point in loaded.points)
        typer.echo(f"{len(results)} runs, {sum(p.tokens for p in loaded.points):,} tokens, {total:.3g} operations")


@scaling_app.command("run")
def run_command(
    sweep: SweepArgument,
    only: Annotated[
        list[str] | None, typer.Option(help="Names or numbers (from 0) of runs. Several times, or all.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Trainings at once. Default: as many as the GPUs, else the cores, suffice for."),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Ranks of each training, on this machine.")] = 1,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Save and stop after so long; the same command goes on.")
    ] = None,
    slurm: Annotated[
        str | None,
        typer.Option(metavar="SCRIPT", help="Print the sbatch line of an array job that runs SCRIPT for each run."),
    ] = None,
) -> None:
    """Train what is not finished: skip what is done, continue what was cut. Ends with 1 if a run failed, with 3 if the
    time was up before all had finished."""
    from moba_megatron.scaling.runner import default_jobs, run_sweep

    with _errors():
        loaded = load_sweep(sweep)
        # Each run once, however often it is named.
        chosen = {loaded.point(name).name for name in only} if only else {point.name for point in loaded.points}
        points = [point for point in loaded.points if point.name in chosen]
        if slurm:
            typer.echo(_array_job(loaded, points, slurm))
            return
        try:
            results = run_sweep(
                loaded, points, jobs=jobs or default_jobs(processes), processes=processes, minutes=minutes
            )
        except KeyboardInterrupt as error:
            raise typer.Exit(130) from error
        _print(plan_rows(loaded, results), f"{sweep}: runs in {loaded.folder}")
        if any(result.state == "failed" for result in results):
            raise typer.Exit(1)
        if any(result.state != "finished" for result in results):
            raise typer.Exit(3)


@scaling_app.command("fit")
def fit_command(sweep: SweepArgument, output: OutputOption = None) -> None:
    """Fit L(C) = a C^b and L(N, D) = E + A/N^alpha + B/D^beta for each attention, and write laws.json."""
    with _errors():
        loaded = load_sweep(sweep)
        results = read_results(loaded)
        laws = _all_laws(loaded, results)
        if not laws:
            raise ConfigError([f"{sweep} has no figure of kind scaling, so there is nothing to fit"])
        _print(law_rows(laws), "laws")
        for line in _notes(laws, results):
            typer.echo(line)
        folder = _folder(loaded, output)
        record = {"laws": [law.to_dict() for law in laws], "left_out": _left_out(laws, results)}
        (folder / "laws.json").write_text(json.dumps(record, indent=1) + "\n")
        typer.echo(folder / "laws.json")


@scaling_app.command("plot")
def plot_command(sweep: SweepArgument, output: OutputOption = None) -> None:
    """Draw the sweep's figures as PNG: loss against compute with its laws and the gap below, and what else it names."""
    from moba_megatron.scaling.plots import draw

    with _errors():
        loaded = load_sweep(sweep)
        results = read_results(loaded)
        if not any(result.step for result in results):
            raise ConfigError([f"no run of {sweep} has started: moba-megatron scaling run {sweep}"])
        for number, figure in enumerate(loaded.file.figures, start=1):
            name = "_".join(filter(None, [str(number), figure.kind, figure.axis, figure.metric]))
            typer.echo(draw(loaded, results, figure, _folder(loaded, output) / f"{name}.png"))
            for line in left_out(results, figure.metric):
                typer.echo(f"  without {line}")


@scaling_app.command("table")
def table_command(sweep: SweepArgument, output: OutputOption = None) -> None:
    """Print results, gaps, laws and what the runs were made on as Markdown; with --output also into FOLDER/table.md."""
    with _errors():
        loaded = load_sweep(sweep)
        results = read_results(loaded)
        text = markdown(result_rows(loaded, results))
        for figure in loaded.file.figures:
            if figure.kind in ("scaling", "options"):
                gaps = gap_rows(loaded, results, figure.compared_axis, figure.metric)
                # Of one run for each option the first table says it all.
                fewest = 1 if figure.kind == "scaling" else 2
                text += "\n" + markdown(gaps) if len(gaps[1]) >= fewest else ""
        laws = _all_laws(loaded, results)
        if any(law.by_6nd or law.three_terms for law in laws):
            text += "\n" + markdown(law_rows(laws))
        text += "".join(f"\n- {line}" for line in [*_notes(laws, results), *provenance(results)])
        typer.echo(text)
        if output:
            (_folder(loaded, output) / "table.md").write_text(text + "\n")


def _array_job(sweep: Sweep, points: list[Point], script: str) -> str:
    """The command that submits what is not finished among some runs; one that does nothing where all is."""
    if not Path(script).is_file():
        raise ConfigError([f"--slurm {script}: no such file (launch/sweep.sbatch is meant for it)"])
    chained = [point.name for point in points if point.start_from]
    if chained:
        raise ConfigError([f"--slurm: {', '.join(chained)} start from other runs, tasks of an array wait for nothing: "
                           "see launch/continued_pretraining.sh for a chain of jobs"])  # fmt: skip
    unfinished = [sweep.points.index(point) for point in points if read_result(point).state != "finished"]
    if not unfinished:
        typer.echo("all of them are finished", err=True)
        return "true"
    return f"sbatch --array={','.join(map(str, unfinished))} {shlex.quote(script)} {shlex.quote(str(sweep.path))}"


def _all_laws(sweep: Sweep, results: list[Result]) -> list[Laws]:
    figures = [figure for figure in sweep.file.figures if figure.kind == "scaling"]
    return [law for f in figures for law in fit_sweep(sweep, results, f.compared_axis, f.metric)]


def _notes(laws: list[Laws], results: list[Result]) -> list[str]:
    """What is missing, and why: runs without a result and fits that cannot be made."""
    missing = [f"left out: {line}" for line in _left_out(laws, results)]
    return missing + [f"not fitted: {problem}" for problem in dict.fromkeys(p for law in laws for p in law.problems)]


def _left_out(laws: list[Laws], results: list[Result]) -> list[str]:
    """Runs without one of the metrics that are fitted, or without any result."""
    metrics = dict.fromkeys([law.metric for law in laws] or ["loss"])
    return list(dict.fromkeys(line for metric in metrics for line in left_out(results, metric)))


def _folder(sweep: Sweep, output: Path | None) -> Path:
    folder = output or sweep.folder
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _print(rows: Rows, title: str) -> None:
    headings, lines = rows
    table = Table(*headings, title=title)
    for line in lines:
        table.add_row(*line)
    # In a file or a pipe nothing is cut off.
    Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table)


@contextmanager
def _errors() -> Iterator[None]:
    """A problem of the user's ends with 2 and one line for each."""
    try:
        yield
    except ConfigError as error:
        typer.echo("\n".join(f"error: {line}" for line in error.problems), err=True)
        raise typer.Exit(2) from error
