"""The routing report in numbers and words: a record for each layer, a table, and advice."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table
from torch import Tensor

from moba_megatron.evaluation.routing.held_curve import HeldCurve
from moba_megatron.evaluation.routing.mass import Mass, RoutingChoice, joined
from moba_megatron.evaluation.routing.selection_counts import SelectionCounts
from moba_megatron.model.schedule import LayerAttention

# Differences of mass that are worth a word.
MUCH = 0.02
LITTLE = 0.005


@dataclass
class LayerRouting:
    """What was seen of one MoBA layer: counts over all queries, masses of the sampled ones for its own choice and the
    others it is compared with."""

    layer: int
    attention: LayerAttention
    choices: list[RoutingChoice]
    counts: SelectionCounts = field(default_factory=SelectionCounts)
    masses: list[list[Mass]] = field(default_factory=list)
    """One list a batch, in the order of `choices`."""
    curves: list[HeldCurve] = field(default_factory=list)
    """One a batch, where they are asked for."""


def layer_record(layer: LayerRouting) -> dict[str, Any]:
    """Everything seen of one layer, JSON-ready. Lists have one entry a head; `chosen_at_distance` has for each head one
    entry a distance, from 1 block on. The first of `choices` is the layer's own, and there are none where no query has
    a choice; `held_tenth` is the mass that nine queries in ten exceed."""
    counts = layer.counts
    return {
        "layer": layer.layer,
        "attention": str(layer.attention),
        "queries": counts.queries,
        "queries_with_choice": counts.with_choice,
        "sampled_queries": sum(batch[0].held.shape[0] for batch in layer.masses),
        "entropy": _numbers(counts.entropy()),
        "coverage": _numbers(counts.coverage()),
        "hottest_load": _numbers(counts.hottest_load()),
        "chosen_at_distance": [_numbers(row) for row in counts.distance_shares()],
        "choices": [
            _choice_record(choice, [batch[place] for batch in layer.masses])
            for place, choice in enumerate(layer.choices)
            if layer.masses
        ],
    }


def routed(report: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of layers in which any query has a choice."""
    return [record for record in report if record["choices"]]


def overall(report: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over all layers and heads that choose, and the least mass held by any head. Where an index chooses, also
    the mass held by the choice of the attention's own queries and keys, by their means and by bounds on them."""
    report = routed(report)
    own = [record["choices"][0] for record in report]
    names = ("held", "best", "nearest")
    masses = {f"mass_{name}": fmean(value for choice in own for value in choice[name]) for name in names}
    counts = {}
    for name in ("entropy", "coverage", "hottest_load"):
        known = [value for record in report for value in record[name] if value is not None]
        # A layer that may take its own block only (top_k = 1) chooses nothing.
        counts[name] = fmean(known) if known else None
    for name, place in (("means", -2), ("min_max", -1)):
        compared = [record["choices"][place] for record in report if record["choices"][0]["by"] == "index"]
        if compared:
            masses[f"mass_{name}"] = fmean(value for choice in compared for value in choice["held"])
    return {**masses, "mass_held_lowest": min(min(choice["held"]) for choice in own), **counts}


def table(report: list[dict[str, Any]]) -> Table:
    """One row a layer, means over its heads: mass held, by the head that holds least, by the best and by the nearest
    blocks; entropy, coverage and hottest load of the choices; the share of queries that have a choice. A layer in which
    none has one holds everything its queries may look at. Beside an index, what the means of the attention's own keys
    and bounds on them would hold, in place of entropy and coverage."""
    indexed = any(record["choices"][0]["by"] == "index" for record in routed(report))
    middle = ("means", "min-max") if indexed else ("entropy", "coverage")
    columns = ("layer", "held", "least", "best", "nearest", *middle, "hottest", "choice")
    shown = Table(
        *(Column(name, justify="right", no_wrap=True) for name in columns), box=SIMPLE_HEAD, collapse_padding=True
    )
    for record in report:
        if not record["choices"]:
            shown.add_row(f"{record['layer']}", *["-"] * (len(columns) - 2), _percent(0))
            continue
        own = record["choices"][0]
        shown.add_row(
            f"{record['layer']}",
            *(_percent(value) for value in (_mean(own["held"]), min(own["held"]))),
            *(_percent(_mean(own[name])) for name in ("best", "nearest")),
            *(_compared(record) if indexed else _spread(record)),
            f"{_mean(record['hottest_load']):.1f}x",
            _percent(record["queries_with_choice"] / record["queries"]),
        )
    return shown


def _spread(record: dict[str, Any]) -> tuple[str, str]:
    """Entropy and coverage of the choices."""
    return f"{_mean(record['entropy']):.2f}", _percent(_mean(record["coverage"]))


def _compared(record: dict[str, Any]) -> tuple[str, ...]:
    """Masses that the means of the attention's own keys would hold, and bounds on them."""
    return tuple(_percent(_mean(choice["held"])) for choice in record["choices"][-2:])


def advice(report: list[dict[str, Any]]) -> list[str]:
    """What to make of the report, in sentences; layers that attend alike are judged together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in report:
        groups.setdefault(record["attention"], []).append(record)
    return [line for records in groups.values() for line in (_advice(routed(records)) or _no_choice(records))]


def _no_choice(records: list[dict[str, Any]]) -> list[str]:
    return [
        f"{_names(records)} ({records[0]['attention']}): no query has more past blocks than it may take: nothing is "
        "routed on this text."
    ]


def _names(records: list[dict[str, Any]]) -> str:
    numbers = [record["layer"] for record in records]
    return f"layer {numbers[0]}" if len(numbers) == 1 else f"layers {', '.join(map(str, numbers))}"


def _advice(records: list[dict[str, Any]]) -> list[str]:
    if not records:
        return []
    own, *others = _merged(records)
    lines = [
        f"{_names(records)} ({own['choice']}): the chosen blocks hold {_percent(own['held'])} of full attention's "
        f"mass; the best choice of as many would hold {_percent(own['best'])}, the nearest {_percent(own['nearest'])}."
    ]
    if own["held"] - own["nearest"] < LITTLE:
        lines.append(
            "  The nearest blocks hold as much: on this text the choice finds nothing that a sliding window misses."
        )
    if own["by"] == "index":
        *others, means, min_max = others
        lines.append(
            f"  The attention's own queries would hold {_percent(means['held'])} by the means of its keys, and "
            f"{_percent(min_max['held'])} by bounds on them (min_max)."
        )
    *same_cost, doubled = others
    better = max(same_cost, key=lambda choice: choice["held"], default=own)
    if better["held"] - own["held"] >= MUCH:
        lines.append(f"  At equal cost {better['choice']} would hold {_percent(better['held'])}: try it.")
    elif same_cost:
        listed = ", ".join(f"{choice['choice']} {_percent(choice['held'])}" for choice in same_cost)
        lines.append(f"  At equal cost no other choice would hold clearly more ({listed}).")
    gain = doubled["held"] - own["held"]
    worth = "try a larger K" if gain >= MUCH else "a larger K adds little"
    lines.append(f"  At twice the cost {doubled['choice']} would hold {_percent(doubled['held'])}: {worth}.")
    return lines


def _merged(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices of layers that attend alike, each mass a mean over layers and heads."""
    merged = []
    for same in zip(*(record["choices"] for record in records), strict=True):
        masses = {name: fmean(v for choice in same for v in choice[name]) for name in ("held", "best", "nearest")}
        merged.append({"choice": same[0]["choice"], "by": same[0]["by"], **masses})
    return merged


def _choice_record(choice: RoutingChoice, masses: list[Mass]) -> dict[str, Any]:
    mass = joined(masses)
    return {
        "choice": str(choice),
        "block_size": choice.block_size,
        "top_k": choice.top_k,
        "by": choice.by,
        "held": _numbers(mass.held.mean(dim=0)),
        "held_tenth": _numbers(mass.held.quantile(0.1, dim=0)),
        "best": _numbers(mass.best.mean(dim=0)),
        "nearest": _numbers(mass.nearest.mean(dim=0)),
    }


def _numbers(values: Tensor) -> list[float | None]:
    """JSON knows no NaN: None where nothing was counted."""
    return [None if math.isnan(value) else value for value in values.tolist()]


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return fmean(known) if known else math.nan


def _percent(share: float) -> str:
    return f"{share:.1%}"
