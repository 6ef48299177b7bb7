"""The plan of a configuration on a cluster: its own layout and others, printed and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from moba_megatron.config import Config, ConfigError, check_world
from moba_megatron.model.schedule import AttentionSchedule, checked_schedule
from moba_megatron.planning.plan_layouts import Layout, suggest_layouts
from moba_megatron.planning.plan_machines import Cluster
from moba_megatron.planning.plan_report import (
    assumptions,
    print_alternatives,
    print_cost,
    print_layouts,
    print_plan,
    to_json,
)
from moba_megatron.planning.plan_target import Target
from moba_megatron.planning.run_plan import (
    Alternative,
    RunPlan,
    alternatives,
    check_precision,
    plan_run,
    vocabulary_size,
)


def plan_on(target: Target, layouts: int, price_per_hour: float | None, output: Path | None) -> bool:
    """Print the plan of a configuration, and layouts that serve it better.

    Args:
        layouts: how many to suggest.
        price_per_hour: of one GPU, in any currency; None: no cost is printed.
        output: a file for everything as JSON.

    Returns:
        Whether the configuration's own layout fits the cluster.

    Raises:
        ConfigError: a configuration that cannot be planned.
    """
    config, cluster = target.config, target.cluster
    schedule = checked_schedule(config)
    vocab_size = vocabulary_size(config)
    plan, problem = _own_layout(config, schedule, vocab_size, cluster)
    others = [] if plan is None else alternatives(config, schedule, vocab_size, cluster)
    suggested = suggest_layouts(config, schedule, vocab_size, cluster, layouts) if layouts else []
    console = Console(highlight=False, soft_wrap=True)
    for line in target.notes:
        console.print(line, markup=False)
    mixture = config.model.num_moe_experts is not None
    _print(console, plan, problem, others, suggested, layouts > 0, cluster, price_per_hour, mixture)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        written = to_json(plan, problem, others, suggested, cluster, mixture)
        output.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        console.print(f"  {output}")
    return plan is not None and plan.fits


def _print(
    console: Console,
    plan: RunPlan | None,
    problem: str | None,
    others: list[Alternative],
    suggested: list[Layout],
    asked: bool,
    cluster: Cluster,
    price: float | None,
    mixture: bool,
) -> None:
    if plan is None:
        console.print(f"the configuration's own layout cannot run on {cluster.count} GPUs: {problem}", markup=False)
    else:
        print_plan(console, plan)
        print_cost(console, plan, price)
        print_alternatives(console, plan, others)
    if asked:
        print_layouts(console, suggested)
    console.print("\n".join(["assumptions", *(f"  {line}" for line in assumptions(cluster, mixture))]), markup=False)


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
