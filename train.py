"""Train a language model: python train.py CONFIG.yaml [key.path=value ...], or the same under torchrun."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from moba_megatron.config import ConfigError, load_config
from moba_megatron.platform.quiet import silence_missing_libraries


def main(
    config: Annotated[Path, typer.Argument(help="YAML configuration; docs/configuration.md lists every key.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, for instance training.steps=100.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would run, with sizes and memory, and stop.")
    ] = False,
) -> None:
    """Train a language model with MoBA attention on megatron-core. A run folder that holds a run is continued."""
    silence_missing_libraries()
    first_rank = os.environ.get("RANK", "0") == "0"
    try:
        loaded = load_config(config, overrides)
        if dry_run:
            from moba_megatron.training.dry_run import print_dry_run

            print_dry_run(loaded, int(os.environ.get("WORLD_SIZE", "1")))
            return
        from moba_megatron.training.run import preflight, train

        ready = preflight(loaded, int(os.environ.get("WORLD_SIZE", "1")))
    except ConfigError as error:
        if first_rank:
            typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    from moba_megatron.platform.processes import die_with_parent, leave
    from moba_megatron.training.faults import leave_after_failure

    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    try:
        train(loaded, ready)
    except BaseException as error:  # a rank that fails must not leave the others waiting
        leave_after_failure(error, loaded.run.dir)
    leave(0)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
