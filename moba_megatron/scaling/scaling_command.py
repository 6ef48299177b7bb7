"""`moba-megatron scaling`: sweeps of training runs from one YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moba_megatron.errors import user_errors

scaling_app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

SweepArgument = Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="See docs/scaling.md.")]
OutputOption = Annotated[Path | None, typer.Option(help="Folder to write into. Default: the sweep's dir.")]


@scaling_app.callback()
def scaling() -> None:
    """Sweeps: a grid of training runs from one YAML file, their scaling laws, and figure 3 of the MoBA report."""


@scaling_app.command("plan")
@user_errors(apart=True)
def plan_command(sweep: SweepArgument) -> None:
    """List the runs with parameters, tokens, learning rate, operations and state."""
    from moba_megatron.scaling.actions import show_plan

    show_plan(sweep)


@scaling_app.command("run")
@user_errors(apart=True)
def run_command(
    sweep: SweepArgument,
    only: Annotated[
        list[str] | None, typer.Option(help="Name or number (from 0) of a run; repeat it for several. Default: all.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, max=4096, help="Trainings at a time. Default: one for each --processes GPUs, or cores without GPUs."
        ),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, max=4096, help="Ranks of each training, on this machine.")] = 1,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Save and stop after this time; the same command continues.")
    ] = None,
    slurm: Annotated[
        str | None,
        typer.Option(metavar="SCRIPT", help="Print the sbatch command of an array job that runs SCRIPT for each run."),
    ] = None,
) -> None:
    """Train the unfinished runs: skip finished ones, continue interrupted ones. The exit code is 1 if a run failed, and
    3 if the time was up before all had finished."""
    from moba_megatron.scaling.actions import train_runs

    code = train_runs(sweep, only, jobs, processes, minutes, slurm)
    if code:
        raise typer.Exit(code)


@scaling_app.command("fit")
@user_errors(apart=True)
def fit_command(sweep: SweepArgument, output: OutputOption = None) -> None:
    """Fit L(C) = a C^b and L(N, D) = E + A/N^alpha + B/D^beta for each attention, and write laws.json."""
    from moba_megatron.scaling.actions import fit_laws

    fit_laws(sweep, output)


@scaling_app.command("plot")
@user_errors(apart=True)
def plot_command(sweep: SweepArgument, output: OutputOption = None) -> None:
    """Draw the sweep's figures as PNG: loss against compute with laws and the gap below, and the other figures of the
    file."""
    from moba_megatron.scaling.actions import draw_figures

    draw_figures(sweep, output)


@scaling_app.command("table")
@user_errors(apart=True)
def table_command(sweep: SweepArgument, output: OutputOption = None) -> None:
    """Print results, gaps, laws and the machines of the runs as Markdown; with --output also into FOLDER/table.md."""
    from moba_megatron.scaling.actions import print_tables

    print_tables(sweep, output)
