"""The work of the `moba-megatron scaling` commands."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from moba_megatron.config import ConfigError
from moba_megatron.scaling.laws import Laws, fit_sweep, left_out
from moba_megatron.scaling.results import Result, read_result, read_results
from moba_megatron.scaling.runner import default_jobs, run_sweep
from moba_megatron.scaling.sweep import Point, Sweep, load_sweep
from moba_megatron.scaling.tables import Rows, gap_rows, law_rows, markdown, plan_rows, provenance, result_rows


def show_plan(sweep: Path) -> None:
    """See `scaling plan`."""
    loaded = load_sweep(sweep)
    results = read_results(loaded)
    _print(plan_rows(loaded, results), f"{sweep}: runs in {loaded.folder}")
    total = sum(point.flops_true for point in loaded.points)
    typer.echo(f"{len(results)} runs, {sum(p.tokens for p in loaded.points):,} tokens, {total:.3g} operations")


def train_runs(
    sweep: Path, only: list[str] | None, jobs: int | None, processes: int, minutes: float | None, slurm: str | None
) -> int:
    """See `scaling run`. Returns its exit code."""
    loaded = load_sweep(sweep)
    # Each run once, however often it is named.
    chosen = {loaded.point(name).name for name in only} if only else {point.name for point in loaded.points}
    points = [point for point in loaded.points if point.name in chosen]
    if slurm:
        typer.echo(_array_job(loaded, points, slurm))
        return 0
    try:
        results = run_sweep(loaded, points, jobs=jobs or default_jobs(processes), processes=processes, minutes=minutes)
    except KeyboardInterrupt:
        return 130
    _print(plan_rows(loaded, results), f"{sweep}: runs in {loaded.folder}")
    if any(result.state == "failed" for result in results):
        return 1
    return 3 if any(result.state != "finished" for result in results) else 0


def fit_laws(sweep: Path, output: Path | None) -> None:
    """See `scaling fit`."""
    loaded = load_sweep(sweep)
    results = read_results(loaded)
    laws = _all_laws(loaded, results)
    if not laws:
        raise ConfigError([f"{sweep} has no figure of kind scaling, so there is nothing to fit"])
    _print(law_rows(laws), "laws")
    for line in _notes(loaded, laws, results):
        typer.echo(line)
    folder = _folder(loaded, output)
    record = {"laws": [law.to_dict() for law in laws], "left_out": _left_out(laws, results)}
    (folder / "laws.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    typer.echo(folder / "laws.json")


def draw_figures(sweep: Path, output: Path | None) -> None:
    """See `scaling plot`."""
    from moba_megatron.scaling.plots import draw

    loaded = load_sweep(sweep)
    results = read_results(loaded)
    if not any(result.step for result in results):
        raise ConfigError([f"no run of {sweep} has started: moba-megatron scaling run {sweep}"])
    for number, figure in enumerate(loaded.file.figures, start=1):
        name = "_".join(filter(None, [str(number), figure.kind, figure.axis, figure.metric]))
        typer.echo(draw(loaded, results, figure, _folder(loaded, output) / f"{name}.png"))
        for line in left_out(results, figure.metric):
            typer.echo(f"  without {line}")


def print_tables(sweep: Path, output: Path | None) -> None:
    """See `scaling table`."""
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
    text += "".join(f"\n- {line}" for line in [*_notes(loaded, laws, results), *provenance(results)])
    typer.echo(text)
    if output:
        (_folder(loaded, output) / "table.md").write_text(text + "\n", encoding="utf-8")


def _array_job(sweep: Sweep, points: list[Point], script: str) -> str:
    """The command that submits what is not finished among some runs; one that does nothing where all is."""
    if not Path(script).is_file():
        raise ConfigError([f"--slurm {script}: no such file (launch/sweep.sbatch is meant for it)"])
    chained = [point.name for point in points if point.start_from]
    if chained:
        raise ConfigError([f"--slurm: {', '.join(chained)} start from other runs, but an array's tasks do not wait: "
                           "see launch/continued_pretraining.sh for a chain of jobs"])  # fmt: skip
    unfinished = [sweep.points.index(point) for point in points if read_result(point).state != "finished"]
    if not unfinished:
        typer.echo("all of them are finished", err=True)
        return "true"
    return f"sbatch --array={','.join(map(str, unfinished))} {shlex.quote(script)} {shlex.quote(str(sweep.path))}"


def _all_laws(sweep: Sweep, results: list[Result]) -> list[Laws]:
    figures = [figure for figure in sweep.file.figures if figure.kind == "scaling"]
    return [law for f in figures for law in fit_sweep(sweep, results, f.compared_axis, f.metric)]


def _notes(sweep: Sweep, laws: list[Laws], results: list[Result]) -> list[str]:
    """What sizes are; what is missing, and why: runs without a result and fits that cannot be made."""
    notes = ["N: parameters that are active for a token, without embeddings"] if sweep.has_mixtures else []
    notes += [f"left out: {line}" for line in _left_out(laws, results)]
    return notes + [f"not fitted: {problem}" for problem in dict.fromkeys(p for law in laws for p in law.problems)]


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
