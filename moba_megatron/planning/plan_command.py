"""`moba-megatron plan`: what a configuration would take on GPUs that need not be there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from moba_megatron.config import Config, ConfigError, check_world, load_config
from moba_megatron.model.schedule import AttentionSchedule, checked_schedule
from moba_megatron.planning.plan_layouts import Layout, suggest_layouts
from moba_megatron.planning.plan_machines import GPUS, Cluster
from moba_megatron.planning.plan_report import assumptions, print_cost, print_layouts, print_plan, to_json
from moba_megatron.planning.run_plan import RunPlan, check_precision, plan_run, vocabulary_size


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
    try:
        loaded = load_config(config, overrides)
        cluster = _cluster(gpu, gpus, per_node)
        schedule = checked_schedule(loaded)
        vocab_size = vocabulary_size(loaded)
        plan, problem = _own_layout(loaded, schedule, vocab_size, cluster)
        suggested = suggest_layouts(loaded, schedule, vocab_size, cluster, layouts) if layouts else []
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    console = Console(highlight=False, soft_wrap=True)
    _print(console, plan, problem, suggested, layouts > 0, cluster, price_per_hour)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(to_json(plan, problem, suggested, cluster), indent=2) + "\n")
        console.print(f"  {output}")
    if plan is None or not plan.fits:
        raise typer.Exit(1)


def _print(
    console: Console,
    plan: RunPlan | None,
    problem: str | None,
    suggested: list[Layout],
    asked: bool,
    cluster: Cluster,
    price: float | None,
) -> None:
    if plan is None:
        console.print(f"the configuration's own layout cannot run on {cluster.count} GPUs: {problem}", markup=False)
    else:
        print_plan(console, plan)
        print_cost(console, plan, price)
    if asked:
        print_layouts(console, suggested)
    console.print("\n".join(["assumptions", *(f"  {line}" for line in assumptions(cluster))]), markup=False)


def _own_layout(
    config: Config, schedule: AttentionSchedule, vocab_size: int, cluster: Cluster
) -> tuple[RunPlan | None, str | None]:
    """The plan of the layout as configured, or what keeps it from these GPUs; other mistakes come through."""
    check_precision(config)
    try:
        check_world(config, cluster.count)
    except ConfigError as error:
        return None, "; ".join(error.problems)
    return plan_run(config, schedule, vocab_size, cluster), None


def _cluster(gpu: str, count: int, per_node: int) -> Cluster:
    if gpu.lower() not in GPUS:
        raise ConfigError([f"--gpu {gpu}: choose one of {', '.join(GPUS)}"])
    return Cluster(GPUS[gpu.lower()], count, per_node)
