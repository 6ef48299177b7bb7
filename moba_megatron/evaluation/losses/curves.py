"""Curves of one run or several in one picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

Lines = list[dict[str, Any]]


def draw_losses(axes: Any, runs: dict[str, tuple[Lines, Lines]]) -> None:
    """Training loss (thin, and smoothed), validation and trailing loss over the tokens.

    Args:
        axes: of matplotlib, labelled by the caller.
        runs: for each name the lines of steps and of the evaluations that training made, as in the run folder.
    """
    for number, (name, (steps, evaluations)) in enumerate(runs.items()):
        colour, prefix = f"C{2 * number}", f"{name}: " if len(runs) > 1 else ""
        if steps:
            _draw_training_loss(axes, steps, colour, prefix)
        if evaluations:
            label = f"{prefix}validation"
            axes.plot(*_points(evaluations, "loss"), "o-", markersize=4, color=f"C{2 * number + 1}", label=label)
        trailing = [line for line in evaluations if line["trailing_loss"] is not None]
        if trailing:
            label = f"{prefix}last {trailing[-1]['trailing_tokens']} positions"
            axes.plot(*_points(trailing, "trailing_loss"), "s:", markersize=4, color=f"C{2 * number + 1}", label=label)
    if len(runs) == 1:
        _mark_stages(axes, next(iter(runs.values()))[0])
    axes.legend(fontsize=8)


def draw_curve(axes: Any, runs: dict[str, tuple[Lines, Lines]], key: str) -> None:
    """One value of the steps over the tokens, a line a run; steps that lack it are left out."""
    for number, (name, (steps, _)) in enumerate(runs.items()):
        known = [step for step in steps if key in step]
        axes.plot(*_points(known, key), color=f"C{2 * number}", linewidth=1, label=name)
    if len(runs) > 1:
        axes.legend(fontsize=8)


def _draw_training_loss(axes: Any, steps: Lines, colour: str, prefix: str) -> None:
    tokens, losses = _points(steps, "loss")
    width = max(1, len(steps) // 50)
    smooth = [statistics.fmean(losses[max(0, i - width + 1) : i + 1]) for i in range(len(losses))]
    axes.plot(tokens, losses, linewidth=0.5, alpha=0.4, color=colour)
    axes.plot(tokens, smooth, linewidth=1.5, color=colour, label=f"{prefix}training (mean of {width} points)")


def _mark_stages(axes: Any, steps: Lines) -> None:
    for before, after in zip(steps, steps[1:], strict=False):
        if before["stage"] != after["stage"]:
            axes.axvline(before["tokens"], color="grey", linestyle="--", linewidth=1)
            axes.annotate("attention stage", (before["tokens"], axes.get_ylim()[1]), rotation=90, va="top", ha="right")


def _points(lines: Iterable[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    lines = list(lines)
    return [line["tokens"] for line in lines], [line[key] for line in lines]
