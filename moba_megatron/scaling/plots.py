"""Pictures of a sweep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moba_megatron.config.sweep_file import Figure
from moba_megatron.runs.files import read_json_lines
from moba_megatron.runs.folder import trained_steps
from moba_megatron.scaling.laws import fit_sweep, gaps_to_first, left_out
from moba_megatron.scaling.results import Result, best
from moba_megatron.scaling.sweep import PFLOP_S_DAY, Point, Sweep

_COLOURS = [f"C{number}" for number in range(10)]
_MARKERS = "osD^v"
_NAMES = {"loss": "validation loss (nats per token)", "trailing_loss": "trailing loss (nats per token)"}


def draw(sweep: Sweep, results: list[Result], figure: Figure, path: Path) -> Path:
    """Draw one figure of the sweep; a run that has no result is named under it."""
    compared = figure.kind == "scaling" and len(sweep.file.axes[figure.compared_axis]) > 1
    drawing = _new_figure(2 if compared else 1)
    kinds: dict[str, Callable[..., None]] = {
        "scaling": _scaling, "options": _options, "positions": _positions, "curves": _curves,
    }  # fmt: skip
    kinds[figure.kind](drawing, sweep, results, figure)
    missing = left_out(results, figure.metric)
    if missing:
        drawing.supxlabel("without " + "; ".join(missing), fontsize=6, color="tab:red", wrap=True)
    drawing.suptitle(figure.title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path)
    return path


def _name(metric: str) -> str:
    return _NAMES.get(metric, metric.replace("_", " "))


def _new_figure(rows: int) -> Any:
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(6.4, 4.2 + 1.8 * (rows - 1)), dpi=100, layout="constrained")
    drawing.subplots(rows, 1, sharex=rows > 1, height_ratios=[3, 1][:rows])
    for axes in drawing.axes:
        axes.grid(alpha=0.3)
    return drawing


def _scaling(drawing: Any, sweep: Sweep, results: list[Result], figure: Figure) -> None:
    """Loss against compute for each option with its power law, and where there are several, below, the gap between the
    first option and each other one, run by run."""
    above, below = drawing.axes[0], drawing.axes[1:]
    axis = figure.compared_axis
    chosen = best(results, sweep.file.best_of, figure.metric)
    for number, law in enumerate(fit_sweep(sweep, results, axis, figure.metric)):
        mine = [r for r in chosen if r.point.options[axis] == law.option]
        compute = np.array([r.point.flops_6nd for r in mine]) / PFLOP_S_DAY
        colour = _COLOURS[number % len(_COLOURS)]
        label = law.option + (f":  {law.by_6nd}" if law.by_6nd else "")
        above.scatter(
            compute,
            [r.metric(figure.metric) for r in mine],
            color=colour,
            label=label,
            zorder=3,
            alpha=0.7,
            marker=_MARKERS[number % len(_MARKERS)],
        )
        if law.by_6nd:
            line = np.geomspace(compute.min() / 1.5, compute.max() * 1.5, 50)
            above.plot(line, law.by_6nd(line), color=colour, linestyle="--", linewidth=1)
    above.set(xscale="log", yscale="log", ylabel=_name(figure.metric))
    _plain_ticks(above)
    above.legend(fontsize=8)
    drawing.axes[-1].set(xlabel=f"PFLOP/s-days ({sweep.compute})")
    for axes in below:
        _gaps(axes, sweep, chosen, axis, figure.metric)


def _gaps(axes: Any, sweep: Sweep, results: list[Result], axis: str, metric: str) -> None:
    first, *others = sweep.file.axes[axis]
    gaps = gaps_to_first(sweep, results, axis, metric)
    for number, option in enumerate(others, start=1):
        points = [(gap.first.point.flops_6nd / PFLOP_S_DAY, gap.value) for gap in gaps if gap.option == option]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", color=_COLOURS[number], label=option)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(ylabel=f"{first} minus it")
    if gaps:
        axes.legend(fontsize=8)


def _options(drawing: Any, sweep: Sweep, results: list[Result], figure: Figure) -> None:
    """Loss for each option of an axis, one line for each combination of the other axes."""
    axes, axis = drawing.axes[0], figure.axis
    names = list(sweep.file.axes[axis])
    lines: dict[str, dict[str, float]] = {}
    for result in best(results, sweep.file.best_of, figure.metric):
        rest = [option for name, option in result.point.options.items() if name not in (axis, *sweep.file.best_of)]
        lines.setdefault(" ".join(rest), {})[result.point.options[axis]] = result.metric(figure.metric)
    for label, values in lines.items():
        shown = [name for name in names if name in values]
        axes.plot([names.index(name) for name in shown], [values[name] for name in shown], marker="o", label=label)
    long = {"rotation": 30, "ha": "right"} if max(map(len, names)) > 8 else {}
    axes.set_xticks(range(len(names)), names, **long)
    axes.set(xlabel=axis, ylabel=_name(figure.metric))
    if len(lines) > 1:
        axes.legend(fontsize=8)


def _positions(drawing: Any, sweep: Sweep, results: list[Result], figure: Figure) -> None:
    axes = drawing.axes[0]
    for result in results:
        known = [r for r in result.by_position if r["loss"] is not None]
        middles = [(r["start"] + r["end"]) / 2 for r in known]
        axes.plot(middles, [r["loss"] for r in known], marker=".", label=result.point.name)
    axes.set(xlabel="position in the document (tokens)", ylabel="loss (nats per token)")
    axes.legend(fontsize=8)


def _curves(drawing: Any, sweep: Sweep, results: list[Result], figure: Figure) -> None:
    """Training loss by tokens, averaged over a fiftieth of the run; dotted lines where the attention changes. A run
    that starts from another of the sweep goes on where that one ends."""
    axes = drawing.axes[0]
    for number, result in enumerate(results):
        lines = trained_steps(read_json_lines(result.point.run.metrics))
        if not lines:
            continue
        colour = _COLOURS[number % len(_COLOURS)]
        window = max(1, len(lines) // 50)
        loss = np.convolve([line["loss"] for line in lines], np.ones(window) / window, mode="valid")
        first = _tokens_before(result.point)
        axes.plot([first + line["tokens"] for line in lines[window - 1 :]], loss, color=colour, label=result.point.name)
        for before, after in zip(lines, lines[1:], strict=False):
            if before["stage"] != after["stage"]:
                axes.axvline(first + before["tokens"], color=colour, linestyle=":")
    axes.set(xlabel="tokens", ylabel="training loss (nats per token)", yscale="log")
    _plain_ticks(axes)
    axes.legend(fontsize=8)


def _tokens_before(point: Point) -> int:
    """Tokens of the runs that a run starts from."""
    return 0 if point.start_from is None else point.start_from.tokens + _tokens_before(point.start_from)


def _plain_ticks(axes: Any) -> None:
    """Losses span a decade or little more: numbers, not powers of ten, and where they span little more of them."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_formatter(ScalarFormatter() if high < 4 * low else NullFormatter())
