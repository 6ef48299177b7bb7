"""Pictures of evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def new_figure(xlabel: str, ylabel: str) -> tuple[Any, Any]:
    """A figure with one labelled set of axes, drawn without a display."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def plot_positions(curves: dict[str, list[dict[str, Any]]], path: Path) -> Path:
    """Loss by position, one line for each named list of ranges (`PositionRange` as dicts)."""
    figure, axes = new_figure("position in the document (tokens)", "loss (nats per token)")
    for name, ranges in curves.items():
        known = [r for r in ranges if r["loss"] is not None]
        axes.plot([(r["start"] + r["end"]) / 2 for r in known], [r["loss"] for r in known], marker="o", label=name)
    axes.legend()
    figure.savefig(path)
    return path
