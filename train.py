"""Train a language model: python train.py CONFIG.yaml [key.path=value ...], or the same under torchrun."""

from __future__ import annotations

import faulthandler
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from moba_megatron.before_torch import accept_any_text, configure_logging, silence_missing_libraries, wait_briefly
from moba_megatron.config import ConfigError, load_config
from moba_megatron.errors import explained
from moba_megatron.temporary import keep_temporary_files_together, leave_wandb_out


def main(
    config: Annotated[
        Path,
        typer.Argument(help="FILE.yaml, FILE.yaml:VARIANT or SWEEP.yaml:RUN; docs/configuration.md lists every key."),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, for instance training.steps=100.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would run, with sizes and memory, and stop.")
    ] = False,
) -> None:
    """Train a language model with MoBA attention on megatron-core. A run folder that holds a run is continued."""
    faulthandler.enable()
    accept_any_text()
    wait_briefly()  # before torch is imported
    keep_temporary_files_together()
    leave_wandb_out()
    from moba_megatron.platform.launched import check_launch
    from moba_megatron.platform.processes import die_with_parent, end_job, leave, watch_for_failure

    silence_missing_libraries()
    configure_logging("INFO" if os.environ.get("LOCAL_RANK", "0") == "0" else "ERROR")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent()
    try:
        world_size = check_launch(alone=dry_run).world_size
    except ConfigError as error:  # there may be no way to tell the others
        print(f"error: {error}", file=sys.stderr)
        leave(2)
    watch_for_failure()
    try:
        loaded = load_config(config, overrides)
        if dry_run:
            from moba_megatron.training.dry_run import print_dry_run

            return print_dry_run(loaded, world_size)
        from moba_megatron.training.preflight import preflight

        ready = preflight(loaded, world_size)
        from moba_megatron.training.faults import leave_after_failure
        from moba_megatron.training.run import train
    except Exception as error:  # also a file or a library that is broken on one machine
        known = explained(error)
        end_job(error, None if known is None else f"error: {known}", code=1 if known is None else 2)
    try:
        train(loaded, ready)
    except BaseException as error:  # a rank that fails must not leave the others waiting
        leave_after_failure(error, loaded.run.dir, keeps=loaded.training.replay is None)
    leave(0)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
