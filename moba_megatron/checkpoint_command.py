"""`moba-megatron checkpoint`: list checkpoints, show what they hold, find damage, compare two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from moba_megatron.errors import user_errors

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

checkpoint_app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

PlaceArgument = Annotated[
    Path, typer.Argument(metavar="RUN_OR_STEP", help="Run folder (its newest checkpoint) or checkpoint folder step_N.")
]
OptimizerOption = Annotated[
    bool, typer.Option("--optimizer", help="Include the optimizer state, two to three times as large as the weights.")
]
TopOption = Annotated[int, typer.Option(min=1, help="Largest number of rows in each table.")]


@checkpoint_app.callback()
def checkpoint() -> None:
    """Checkpoints: list them, look into them, find damage, compare two. Needs no GPU and no model in memory."""


@checkpoint_app.command("verify")
@user_errors()
def verify_command(
    place: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_STEP",
            help="Checkpoint folder step_N, exported folder, or run folder (all its checkpoints and exports).",
        ),
    ],
) -> None:
    """Read every byte and check: digests of all files, surplus and missing files, pickles that refer to classes that
    are not allowed, infinite or NaN values. The exit code is 1 if anything is damaged."""
    from moba_megatron.convert.run_damage import checkpoint_findings

    console, bad, problems = _console(), 0, []
    table = _table("checkpoint", "what it is", "state")
    with console.status("reading") as status:
        for finding in checkpoint_findings(place, lambda what: status.update(f"reading {what}")):
            _add(table, finding.path.name, finding.words, "damaged" if finding.problems else "as it was written")
            bad += bool(finding.problems)
            problems += [f"{finding.path}: {line}" for line in finding.problems]
    console.print(table)
    for line in problems:
        console.print(f"  {line}", markup=False)
    if bad:
        raise typer.Exit(1)


@checkpoint_app.command("list")
@user_errors()
def list_command(place: PlaceArgument) -> None:
    """List the checkpoints of a run: step, samples, tokens, size, when they were written and by what."""
    import datetime

    from moba_megatron.checkpoint import CheckpointError, Manifest, list_checkpoints
    from moba_megatron.checkpoint.find import find_checkpoint
    from moba_megatron.runs.folder import RunFolder

    console, damaged = _console(), False
    table = _table("checkpoint", "samples", "tokens", "MB", "written", "by")
    for folder in list_checkpoints(RunFolder(place).checkpoints) or [find_checkpoint(place)]:
        try:
            manifest = Manifest.read(folder)
        except CheckpointError as error:
            damaged = True
            _add(table, folder.name, "", "", "", "", str(error))
            continue
        size = sum(entry["bytes"] for entry in manifest.files.values())
        written = datetime.datetime.fromtimestamp((folder / "checkpoint.json").stat().st_mtime)
        _add(
            table,
            folder.name,
            f"{manifest.consumed_samples:,}",
            f"{manifest.tokens:,}",
            f"{size / 1e6:,.1f}",
            f"{written:%Y-%m-%d %H:%M}",
            ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        )
    console.print(table)
    if damaged:
        raise typer.Exit(1)


@checkpoint_app.command("inspect")
@user_errors()
def inspect_command(place: PlaceArgument, optimizer: OptimizerOption = False, top: TopOption = 1000) -> None:
    """Show what a checkpoint holds: counts, and shapes, dtypes and norms of its tensors. The exit code is 1 if a value
    is infinite or NaN."""
    from moba_megatron.checkpoint import Manifest
    from moba_megatron.checkpoint.find import find_checkpoint
    from moba_megatron.checkpoint.inspection import tensor_facts

    console = _console()
    with console.status("reading") as status:
        folder = find_checkpoint(place)
        manifest = Manifest.read(folder)
        facts = tensor_facts(folder, optimizer=optimizer, advance=lambda what: status.update(f"reading {what}"))
    about = _table("checkpoint", str(folder))
    for name, value in _about(manifest).items():
        _add(about, name, value)
    console.print(about)
    table = _table("tensor", "shape", "dtype", "parts", "norm", "largest")
    for fact in facts[:top]:
        shape = " x ".join(map(str, fact.shape))
        _add(table, fact.key, shape, fact.dtype, str(fact.parts), f"{fact.norm:.6g}", f"{fact.largest:.4g}")
    console.print(table)
    if len(facts) > top:
        console.print(f"and {len(facts) - top} more (--top)")
    bad = [fact.key for fact in facts if not fact.finite]
    for key in bad:
        console.print(f"  not finite (infinite or NaN): {key}", markup=False)
    if bad:
        raise typer.Exit(1)


@checkpoint_app.command("diff")
@user_errors()
def diff_command(
    first: PlaceArgument, second: PlaceArgument, optimizer: OptimizerOption = False, top: TopOption = 20
) -> None:
    """Show how two checkpoints differ: settings and counts, and tensors by their largest difference. Their parallel
    layouts may differ."""
    from moba_megatron.checkpoint import Manifest
    from moba_megatron.checkpoint.find import find_checkpoint
    from moba_megatron.checkpoint.inspection import setting_differences, tensor_differences

    console = _console()
    with console.status("reading") as status:
        folders = [find_checkpoint(place) for place in (first, second)]
        settings = setting_differences(*map(Manifest.read, folders))
        tensors = tensor_differences(
            *folders, optimizer=optimizer, advance=lambda what: status.update(f"reading {what}")
        )
    for name, folder in zip(("first", "second"), folders, strict=True):
        console.print(f"{name}: {folder}", markup=False)
    if settings:
        table = _table("setting", "first", "second")
        for key, values in list(settings.items())[:top]:
            _add(table, key, *map(_short, values))
        console.print(table)
    differing = [tensor for tensor in tensors if not tensor.same]
    if differing:
        table = _table("tensor", "largest difference", "norm of it", "norm of the first")
        for tensor in differing[:top]:
            numbers = (f"{tensor.largest:.3e}", f"{tensor.norm:.3e}", f"{tensor.first_norm:.6g}")
            _add(table, tensor.key, *((tensor.why, "", "") if tensor.why else numbers))
        console.print(table)
    console.print(
        f"{len(settings)} settings and counts differ; {len(differing)} of {len(tensors)} tensors differ, "
        f"{len(tensors) - len(differing)} are the same"
    )


def _about(manifest: Any) -> dict[str, str]:
    config, layout = manifest.config, manifest.config["parallel"]
    sizes = [f"{name} {layout[name]}" for name in ("tensor", "pipeline", "context") if layout.get(name, 1) > 1]
    return {
        "step": f"{manifest.step:,} of {config['training']['steps']:,}",
        "samples": f"{manifest.consumed_samples:,}",
        "tokens": f"{manifest.tokens:,}",
        "attention": str(config["attention"].get("kind")),
        "written at": ", ".join(sizes) or "one rank of a model",
        "by": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        "data": ", ".join(f"{name} {digest}" for name, digest in manifest.data.items()),
        "files": f"{len(manifest.files)}, {sum(entry['bytes'] for entry in manifest.files.values()) / 1e6:,.1f} MB",
    }


def _table(*names: str) -> Table:
    """A table whose first column, a name, is never shortened."""
    from rich.table import Column, Table

    return Table(Column(names[0], overflow="fold"), *(Column(escape(name), overflow="fold") for name in names[1:]))


def _add(table: Table, *cells: str) -> None:
    """Add a row as it is: brackets in it are no markup."""
    table.add_row(*map(escape, cells))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)
