"""One HTML page about a run, or several side by side, that needs no network and no other file."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from moba_megatron import __version__
from moba_megatron.evaluation.report.page import render_page
from moba_megatron.evaluation.report.pictures import (
    curves_picture,
    experts_picture,
    pictures_of,
    positions_picture,
    routing_pictures,
)
from moba_megatron.evaluation.report.run_view import RunView


def report_page(views: list[RunView]) -> str:
    """The page of one run or several, as HTML."""
    return render_page(
        title=" and ".join(view.name for view in views),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        names=[view.name for view in views],
        numbers=_side_by_side([view.numbers() for view in views]),
        layouts=[(view.name, _layouts(view)) for view in views if view.layouts],
        throughput=_side_by_side([view.throughput() for view in views]),
        differences=_side_by_side([_flat(view.config) for view in views], different=True) if len(views) > 1 else [],
        curves=curves_picture(views),
        positions=positions_picture(views),
        experts=[(view.name, picture) for view in views if (picture := experts_picture(view))],
        routing=[_routing(view) for view in views if view.latest("routing")],
        evaluations=[table for view in views for table in _other_evaluations(view)],
        environment=_side_by_side([list(view.environment.items()) for view in views]),
        configs=[(view.name, view.config_text) for view in views],
    )


def distinct(views: list[RunView]) -> list[RunView]:
    """Runs whose folders have the same name are told apart by their paths."""
    names = [view.name for view in views]
    for view in views:
        if names.count(view.name) > 1:
            view.name = str(view.folder)
    if len({view.folder.path.resolve() for view in views}) < len(views):
        raise ValueError(f"the same run twice: {', '.join(str(view.folder) for view in views)}")
    return views


def _layouts(view: RunView) -> list[tuple[str, str]]:
    """The steps at which the layout changed, and how."""
    return [
        (f"from step {step + 1} on", ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in changes.items()))
        for step, changes in view.layouts
    ]


def _side_by_side(columns: list[list[tuple[str, Any]]], different: bool = False) -> list[tuple[str, list[str]]]:
    """Rows of a table with one column a run; with `different`, only those in which the runs differ."""
    tables = [dict(column) for column in columns]
    rows = [(key, [str(table.get(key, "")) for table in tables]) for key in dict.fromkeys(k for t in tables for k in t)]
    return [row for row in rows if not different or len(set(row[1])) > 1]


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows = []
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        rows += _flat(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return rows


def _routing(view: RunView) -> dict[str, Any]:
    """The newest routing report of a run: what to do, the layers in numbers, a picture each."""
    line = view.latest("routing")[0]
    record = view.recorded(line) or {"layers": [], "advice": []}
    return {
        "name": view.name,
        "step": line["step"],
        "sizes": f", if it chose {line['choice']}" if "choice" in line else "",
        "numbers": [(key.replace("_", " "), _number(line[key])) for key in line if isinstance(line[key], float)],
        "advice": record["advice"],
        "pictures": routing_pictures(record["layers"]),
    }


def _other_evaluations(view: RunView) -> list[dict[str, Any]]:
    """A table for every other kind of evaluation (tasks, lm_eval, ...): its numbers by attention, and its pictures."""
    tables = []
    for kind in view.kinds():
        if kind in ("losses", "routing"):
            continue
        lines = view.latest(kind)
        columns = [[(key, _number(value)) for key, value in line.items() if _is_result(key, value)] for line in lines]
        tables.append(
            {
                "title": f"{kind} of {view.name}, step {lines[0]['step']}",
                "attentions": [line["attention"] for line in lines],
                "rows": _side_by_side(columns),
                "pictures": pictures_of(view.folder.plots, f"{kind}_*step_{lines[0]['step']}.png"),
            }
        )
    return tables


def _is_result(key: str, value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and key not in ("step", "tokens")


def _number(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
