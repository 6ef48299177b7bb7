"""`moba-megatron plan`: what a configuration would take on GPUs that need not be there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plan_command(
    config: Annotated[Path, typer.Argument(help="YAML configuration, as for train.py.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.path=value, for instance parallel.tensor=8.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs, all together.")] = 8,
    gpu: Annotated[str, typer.Option(help="a100 (80 GB), h100, h200 or b200.")] = "h100",
    per_node: Annotated[int, typer.Option(min=1, help="GPUs in a node, joined by fast links.")] = 8,
    price_per_hour: Annotated[float | None, typer.Option(min=0, help="Price of one GPU hour, in any currency.")] = None,
    layouts: Annotated[int, typer.Option(min=0, help="How many layouts to suggest.")] = 5,
    output: Annotated[Path | None, typer.Option("--json", help="Write everything into this file as well.")] = None,
) -> None:
    """Estimate memory, communication, time and cost of a configuration on GPUs, and suggest layouts.

    Nothing is measured and no GPU is needed. Ends with 1 if the configuration's own layout does not fit these GPUs, and
    with 2 for mistakes.
    """
    from moba_megatron.config import ConfigError, load_config
    from moba_megatron.planning.plan_cluster import chosen_cluster, plan_on

    try:
        fits = plan_on(
            load_config(config, overrides), chosen_cluster(gpu, gpus, per_node), layouts, price_per_hour, output
        )
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    if not fits:
        raise typer.Exit(1)
