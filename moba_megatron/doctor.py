"""`moba-megatron doctor`: what this machine has, and what a run on it would use."""

from __future__ import annotations

import importlib.metadata
import os
import platform as machine
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from moba_megatron import __version__
from moba_megatron.errors import user_errors

_HALF_INSTALLED = (
    "Transformer Engine without its compiled part does this: install it whole (pip install --no-build-isolation "
    "'transformer-engine[pytorch]' on a machine with CUDA), or take it out"
)
PACKAGES = ("torch", "megatron-core", "triton", "transformers", "tokenizers", "datasets", "gigatoken", "wandb")


@user_errors()
def doctor_command(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CONFIG|RUN]",
            help="With a configuration: also print what a run would choose, and check data and weights. With a run "
            "folder: look for damage in it instead.",
        ),
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value")] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="A folder that `prepare` made: only read all of its files and look for damage. May be given several "
            "times."
        ),
    ] = None,
) -> None:
    """Print versions, devices, optional libraries and attention backends, and why some cannot run. With a
    configuration, the exit code is 2 if its settings, data, first weights or run folder would stop a run. With --data,
    the exit code is 2 if prepared data are damaged.

    With a run folder, read all of its checkpoints, exports and records, as `checkpoint verify` does. The exit code is 1
    if any is damaged.
    """
    console = Console(highlight=False, soft_wrap=True)
    if data:
        _check_data(console, data)
        if config is None:
            return
    if config is not None and config.is_dir():
        _print_damage(console, config)
        return
    _print_versions(console)
    _print_libraries(console)
    _print_backends(console)
    if config is not None:
        _print_run(console, config, overrides)


def _check_data(console: Console, folders: list[Path]) -> None:
    """Compare prepared data with its manifest: digests of all files, indices, ids.

    Raises:
        ValueError: a folder is damaged, or none that `prepare` made.
    """
    from moba_megatron.corpus.inspect import check_dataset

    damaged = []
    for folder in folders:
        console.print(f"data in {folder}", markup=False)
        wrong = 0
        for what, problem in check_dataset(folder):
            console.print(f"  {what}: {problem or 'ok'}", markup=False)
            wrong += problem is not None
        damaged += [f"{folder} is damaged ({wrong} problems): copy it again, or prepare the data again"] * bool(wrong)
    if damaged:
        raise ValueError("; ".join(damaged))


def _print_damage(console: Console, run: Path) -> None:
    """Print what is damaged in a run folder. The exit code is 1 if anything is."""
    from moba_megatron.convert.run_damage import run_findings

    table, problems = Table(str(run), "what it is", "state"), []
    with console.status("reading") as status:
        for finding in run_findings(run, lambda what: status.update(f"reading {what}")):
            name = str(finding.path.relative_to(run))
            _add_row(table, name, finding.words, "damaged" if finding.problems else "as it should be")
            problems += [f"{finding.path}: {line}" for line in finding.problems]
    console.print(table)
    for line in problems:
        console.print(f"  {line}", markup=False)
    if problems:
        raise typer.Exit(1)


def _print_run(console: Console, path: Path, overrides: list[str] | None) -> None:
    """What a run of a configuration would use and what it would read.

    Raises:
        ConfigError: it would not start.
    """
    from moba_megatron.config import load_config
    from moba_megatron.model.schedule import checked_schedule
    from moba_megatron.training.preflight import preflight, run_choices

    config = load_config(path, overrides)
    lines = run_choices(config, checked_schedule(config))
    console.print("\n".join([f"a run of {path} would use", *(f"  {line}" for line in lines)]), markup=False)
    ready = preflight(config, config.parallel.fewest_ranks)
    for line in ready.choices[len(lines) :]:
        console.print(f"  {line}", markup=False)
    console.print(
        f"  data: {ready.data.train_tokens:,} tokens to train on, {ready.data.epochs:.3g} epochs of them; "
        f"{ready.data.validation_tokens:,} to validate on\n"
        f"  {ready.weights}",
        markup=False,
    )


def _print_versions(console: Console) -> None:
    import torch

    table = Table("what", "version")
    _add_row(table, "moba-megatron", __version__)
    _add_row(table, "python", machine.python_version())
    for name in PACKAGES:
        try:
            _add_row(table, name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            _add_row(table, name, "not installed")
        if name == "megatron-core":
            _add_megatron_core(table)
    _add_row(table, "cores this process may use", str(len(os.sched_getaffinity(0))))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    _add_row(table, "GPUs", ", ".join(gpus) or "none: training runs on the CPU with gloo")
    console.print(table)


def _add_megatron_core(table: Table) -> None:
    """What is imported, if that is another than the installed one, and what it lacks."""
    from moba_megatron.platform.megatron_core import imported_elsewhere, missing_capabilities

    try:
        missing, elsewhere = missing_capabilities(), imported_elsewhere()
    except ModuleNotFoundError:  # the base installation has none
        return
    except (ImportError, OSError) as error:
        _add_row(table, "  which does not import", f"{type(error).__name__}: {error}. {_HALF_INSTALLED}")
        return
    if elsewhere:
        _add_row(table, "  but imported", elsewhere)
    for capability in missing:
        _add_row(table, "  which lacks", f"{capability.name}: {capability.without}")


def _add_row(table: Table, *cells: str) -> None:
    """Add a row as it is: brackets in it, such as those of a package's extra, are no markup."""
    table.add_row(*map(escape, cells))


def _print_libraries(console: Console) -> None:
    from moba_megatron.platform import optional_libraries

    table = Table(Column("optional library", no_wrap=True), "state", "used for", "how to get it")
    for library in optional_libraries().values():
        state = f"{library.version or 'found'}" if library.available else f"no: {library.reason}"
        _add_row(table, library.name, state, library.purpose, "" if library.available else library.how_to_get)
    console.print(table)


def _print_backends(console: Console) -> None:
    from moba_megatron.ops import resolve_backend, resolve_full_backend
    from moba_megatron.ops.backends import BACKENDS, FULL_BACKENDS
    from moba_megatron.platform import current_device

    device = current_device()
    for what, backends, chosen in (
        ("MoBA", BACKENDS, resolve_backend("auto", device)),
        ("full attention", FULL_BACKENDS, resolve_full_backend("auto", device)),
    ):
        table = Table(f"{what} by", f"on {device.type}", "what it is")
        for backend in backends.values():
            reason = backend.unavailable(device)
            _add_row(table, backend.name, "available" if reason is None else f"no: {reason}", backend.summary)
        _add_row(table, "auto", *chosen)
        console.print(table)
