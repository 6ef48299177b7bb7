"""A plan as tables for people and as JSON for programs."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from moba_megatron.model.exchange_choice import resolve_exchange
from moba_megatron.planning.memory import MemoryEstimate
from moba_megatron.planning.plan_layouts import Layout
from moba_megatron.planning.plan_machines import EXPERT_SHARE, LINK_SHARE, MATRIX_SHARE, MEMORY_SHARE, Cluster
from moba_megatron.planning.plan_savings import Saving
from moba_megatron.planning.plan_stages import expert_replicas
from moba_megatron.planning.run_plan import Alternative, RunPlan

MEMORY_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "moba": "chosen blocks, log-sum-exps",
    "working": "working memory, the largest of:",
    "loss": "  the loss, in chunks",
    "backward": "  backward of a layer",
    "exchange": "  its context-parallel buffers",
    "total": "total",
}


def assumptions(cluster: Cluster, mixture: bool = False) -> list[str]:
    """The assumptions behind the numbers, one line each.

    Args:
        mixture: whether the model is a mixture of experts.
    """
    gpu = cluster.gpu
    of_experts = [
        f"experts: all get the same number of tokens, {EXPERT_SHARE:.0%} of the peak in their products; their "
        f"transfers do not overlap with computation"
    ]
    return [
        "estimates: nothing here was measured on a GPU; memory formulas were compared with CPU runs (docs/planning.md)",
        f"{gpu.name}: {gpu.machine.peak / 1e12:.0f} TFLOP/s in bf16, {MATRIX_SHARE:.0%} of it in matrix products; "
        f"attention by the kernel model (bench --model)",
        f"links: {gpu.node_link / 1e9:.0f} GB/s a GPU within nodes of {cluster.per_node}, "
        f"{gpu.network_link / 1e9:.0f} GB/s between them, used at {LINK_SHARE:.0%}",
        f"memory: {MEMORY_SHARE:.0%} of {gpu.memory / 1e9:.0f} GB may be used; layers of Transformer Engine",
        "every sample is one document as long as the sequence: packs of short ones are faster",
        "a ring overlaps with attention, transfers of interleaved pipelines with all computation, gradients with the "
        "last backward pass if parallel.overlap_grad_reduce is set; other transfers do not overlap",
        *(of_experts if mixture else []),
        "checkpoints, evaluation, data and restarts are not included",
    ]


def print_plan(console: Console, plan: RunPlan) -> None:
    """Memory, bytes and time of the configuration's own layout."""
    config, parallel, gpu = plan.config, plan.config.parallel, plan.cluster.gpu
    console.print(
        f"{plan.cluster.count} x {gpu.name}: TP {parallel.tensor}{' + SP' if parallel.sequence else ''} x CP "
        f"{parallel.context} x PP {parallel.pipeline} x DP {plan.data_parallel}{_expert_words(plan)}, recompute "
        f"{Saving.in_use(config).words}, {config.tokens_per_step:,} tokens a step, {config.training.steps:,} steps"
    )
    if plan.parameters != plan.active:
        console.print(f"{plan.parameters:,} parameters, {plan.active:,} of them active for a token")
    if plan.parameters != plan.trained:
        console.print(f"{plan.parameters:,} parameters, {plan.trained:,} of them learn, the rest is frozen")
    if parallel.pipeline_layers:
        console.print(f"layers of each pipeline stage: {parallel.pipeline_layers}", markup=False)
    for line in resolve_exchange(config).lines:
        console.print(line, markup=False)
    console.print(memory_table({f"{gpu.name}, GiB": plan.peak}))
    limit = MEMORY_SHARE * gpu.memory
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    console.print(f"{verdict}: {plan.peak.total / 2**30:.1f} of {limit / 2**30:.1f} GiB on pipeline stage "
                  f"{plan.peak.stage} (of {len(plan.memory)}, from 0)")  # fmt: skip
    evaluation = plan.evaluation
    console.print(f"evaluate in this layout: {evaluation.weights / 2**30:.1f} GiB of weights, "
                  f"{evaluation.working / 2**30:.1f} GiB at work")  # fmt: skip
    console.print(_time_table(plan))
    console.print(
        f"{plan.tokens_per_second:,.0f} tokens/s, {plan.mfu:.1%} of the peak in model FLOPs (attended pairs); "
        f"{plan.full.seconds / plan.step_seconds:.2f} x the speed of full attention in all layers"
    )
    for slow in plan.slower:
        console.print(slow.line, markup=False)


def _expert_words(plan: RunPlan) -> str:
    parallel = plan.config.parallel
    if plan.config.model.num_moe_experts is None:
        return ""
    within = f" x ETP {parallel.expert_tensor}" if parallel.expert_tensor > 1 else ""
    replicas = expert_replicas(plan.config, plan.data_parallel)
    return f"; experts: EP {parallel.expert}{within}, {replicas} copies, {parallel.expert_dispatcher}"


def print_cost(console: Console, plan: RunPlan, price: float | None) -> None:
    """GPU hours of the whole training, and their price."""
    text = f"{plan.hours:,.1f} hours, {plan.gpu_hours:,.0f} GPU hours"
    if price is not None:
        text += f", {plan.gpu_hours * price:,.0f} at {price:g} a GPU hour"
    console.print(text)


def memory_table(estimates: dict[str, MemoryEstimate], title: str = "memory per rank") -> Table:
    """Bytes by part in GiB, one column an estimate."""
    table = Table(title, *estimates)
    for name, words in MEMORY_PARTS.items():
        values = [f"{getattr(estimate, name) / 2**30:.3f}" for estimate in estimates.values()]
        table.add_row(words, *values, end_section=name == "exchange")
    return table


def print_alternatives(console: Console, plan: RunPlan, found: list[Alternative]) -> None:
    """Other choices of recomputation in the configuration's own layout, and their costs."""
    table = Table("memory of this layout", "GiB", "s/step", "fits")
    own, room = Saving.in_use(plan.config), MEMORY_SHARE * plan.cluster.gpu.memory
    for one in found:
        words = "gradients in bf16" if one.saving is None else f"recompute {one.saving.words}"
        mark = " (as configured)" if one.saving == own else ""
        fits = "yes" if one.memory <= room else "no"
        table.add_row(words + mark, f"{one.memory / 2**30:.1f}", f"{one.step_seconds:.3g}", fits)
    console.print(table)


def print_layouts(console: Console, layouts: list[Layout]) -> None:
    """Suggested layouts, the fastest first, and the overrides of the first."""
    if not layouts:
        console.print("no layout of these GPUs fits: use more or larger GPUs, a shorter sequence or a smaller "
                      "training.micro_batch_size")  # fmt: skip
        return
    mixture = layouts[0].mixture
    columns = (
        "TP",
        "CP",
        "PP",
        "DP",
        *(["EP"] if mixture else []),
        "recompute",
        "GiB",
        "s/step",
        "ktokens/s",
        "layers",
    )
    table = Table(*columns, title="layouts that fit, the fastest first", title_justify="left")
    for layout in layouts:
        sizes = [layout.parallel.tensor, layout.parallel.context, layout.parallel.pipeline, layout.data]
        sizes += [layout.parallel.expert] if mixture else []
        table.add_row(
            *map(str, sizes),
            layout.saving.words,
            f"{layout.memory / 2**30:.1f}",
            f"{layout.step_seconds:.3g}",
            f"{layout.tokens_per_second / 1e3:,.1f}",
            " ".join(map(str, layout.parallel.pipeline_layers or [])) or "equal",
        )
    console.print(table)
    console.print("the first, as overrides: " + shlex.join(layouts[0].overrides), markup=False)


def to_json(
    plan: RunPlan | None,
    problem: str | None,
    others: list[Alternative],
    layouts: list[Layout],
    cluster: Cluster,
    mixture: bool = False,
) -> dict[str, Any]:
    """Everything that is printed, in bytes and seconds. `plan` is None where the own layout cannot run: `problem`."""
    return {
        "gpu": cluster.gpu.name,
        "gpus": cluster.count,
        "gpus_per_node": cluster.per_node,
        "assumptions": assumptions(cluster, mixture),
        "problem": problem,
        "plan": None if plan is None else _plan_values(plan),
        "alternatives": [
            {
                "memory": one.memory,
                "step_seconds": one.step_seconds,
                **({"gradient_precision": "bf16"} if one.saving is None else one.saving.settings),
            }
            for one in others
        ],
        "layouts": [
            {
                **{key: value for key, value in asdict(layout).items() if key not in ("parallel", "mixture", "saving")},
                **layout.saving.settings,
                "parallel": layout.parallel.model_dump(mode="json"),
                "overrides": layout.overrides,
            }
            for layout in layouts
        ],
    }


def _plan_values(plan: RunPlan) -> dict[str, Any]:
    return {
        "parallel": {**plan.config.parallel.model_dump(mode="json"), "data": plan.data_parallel},
        "parameters": plan.parameters,
        "active_parameters": plan.active,
        "trained_parameters": plan.trained,
        "fits": plan.fits,
        "memory_bytes": [{**asdict(estimate), "total": estimate.total} for estimate in plan.memory],
        "evaluation_bytes": {**asdict(plan.evaluation), "total": plan.evaluation.total},
        "stages_of_training": [
            {"share": share, "seconds": step.parts, "received_bytes": step.received, "pipeline_seconds": step.stages}
            for share, step in zip(plan.shares, plan.steps, strict=True)
        ],
        "step_seconds": plan.step_seconds,
        "step_seconds_full_attention": plan.full.seconds,
        "slower_than_full_attention": [
            {
                "block_size": slow.layer.block_size,
                "top_k": slow.layer.blocks,
                "moba_seconds": slow.moba_seconds,
                "full_seconds": slow.full_seconds,
                "message": slow.line,
            }
            for slow in plan.slower
        ],
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu,
        "tokens": plan.config.tokens_per_step * plan.config.training.steps,
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
    }


def _time_table(plan: RunPlan) -> Table:
    columns = [f"training stage {n}" if len(plan.steps) > 1 else "s a step" for n in range(1, len(plan.steps) + 1)]
    table = Table("time of the slowest pipeline stage", *columns, "GiB received a step")
    forms = {"tensor parallelism": "tensor", "context parallelism": "context", "pipeline transfers": "pipeline",
             "data parallelism": "data", "expert parallelism": "experts", "offloading": "host"}  # fmt: skip
    for name in plan.steps[0].parts:
        form = forms.get(name)
        moved = f"{plan.steps[0].received[form] / 2**30:.3g}" if form else ""
        table.add_row(name, *(f"{step.parts[name]:.3g}" for step in plan.steps), moved)
    table.add_section()
    table.add_row("in all", *(f"{step.seconds:.4g}" for step in plan.steps), "")
    far = plan.steps[0].received.get("experts_far", 0.0)
    if far:
        table.caption = f"of what experts receive, {far / 2**30:.3g} GiB come from other nodes"
    return table
