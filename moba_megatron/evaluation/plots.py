"""Pictures of evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {"moba": "tab:blue", "full": "tab:orange"}


def plain(text: str) -> str:
    """Text as matplotlib shows it letter by letter: two dollar signs would begin and end a formula.

    >>> plain("a$x_$b")
    'a\\\\$x_\\\\$b'
    """
    return text.replace("$", r"\$")


def new_figure(xlabel: str, ylabel: str) -> tuple[Any, Any]:
    """A figure with one labelled set of axes, drawn without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def plot_positions(results: dict[str, dict[str, Any]], path: Path) -> Path:
    """Loss by position, over equal ranges beside ranges that double, where a power law is close to a straight line.

    Args:
        results: one line each, by name: records of losses (`Evaluation` as a dict, with `power_law` if one is known).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), dpi=110, layout="constrained")
    equal, doubling = figure.subplots(1, 2)
    for name, result in results.items():
        colour = COLOURS.get(name)
        (line,) = equal.plot(*_points(result["by_position"]), marker="o", markersize=4, label=name, color=colour)
        # Runs of an older version have no doubling ranges.
        doubling.plot(*_points(result.get("by_position_log", [])), "o", label=name, color=line.get_color())
        law = result.get("power_law")
        if law:
            _draw_law(doubling, law, line.get_color())
    equal.set(xlabel="position in the document (tokens)", ylabel="loss (nats per token)")
    doubling.set(xlabel="position, counted from 1 (log)", ylabel="loss (log)", xscale="log", yscale="log")
    doubling.yaxis.set_major_formatter("{x:.3g}")
    doubling.yaxis.set_minor_formatter("{x:.3g}")
    for axes in (equal, doubling):
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.savefig(path)
    return path


def _points(ranges: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Middles (counted from 1) and losses of the ranges that have any."""
    known = [r for r in ranges if r["loss"] is not None]
    return [(r["start"] + r["end"] + 1) / 2 for r in known], [r["loss"] for r in known]


def _draw_law(axes: Any, law: dict[str, Any], colour: str) -> None:
    steps = 60
    positions = [law["first"] * (law["last"] / law["first"]) ** (i / steps) for i in range(steps + 1)]
    losses = [law["a"] * p ** law["b"] + law["c"] for p in positions]
    axes.plot(positions, losses, "--", color=colour, linewidth=1, label=law["formula"])
