"""A sweep as text: the runs, their results and laws, as tables for people and as Markdown."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from fnmatch import fnmatchcase

from moba_megatron.scaling.laws import Laws, gaps_to_first
from moba_megatron.scaling.results import Result
from moba_megatron.scaling.sweep import PFLOP_S_DAY, Point, Sweep

Rows = tuple[list[str], list[list[str]]]


def plan_rows(sweep: Sweep, results: list[Result]) -> Rows:
    """The runs of a sweep and their states."""
    headings = ["run", *_sizes(sweep), "tokens", "steps", "lr", sweep.compute, "true FLOPs", "state"]
    rows = []
    for result in results:
        point = result.point
        number = sweep.points.index(point)
        done = f"{result.state} ({result.step} steps)" if result.state == "cut" else result.state
        rows.append([
            f"{number} {point.name}", *_sizes(sweep, point), f"{point.tokens:,}", f"{point.config.training.steps:,}",
            f"{point.config.optimizer.lr:.3g}", f"{point.flops_6nd:.3g}", f"{point.flops_true:.3g}", done,
        ])  # fmt: skip
    return headings, rows


def result_rows(sweep: Sweep, results: list[Result]) -> Rows:
    """The result of every run; a run without one says why. Figures of further evaluations follow as columns."""
    trailing = any(result.trailing_loss is not None for result in results)
    extra = _extra_columns(sweep, results)
    headings = [*sweep.file.axes, *_sizes(sweep), "tokens", f"PFLOP/s-days ({sweep.compute})", "validation loss"]
    headings += (["trailing loss"] if trailing else []) + extra + ["minutes"]
    rows = []
    for result in results:
        point = result.point
        cells = [*point.options.values(), *_sizes(sweep, point), f"{point.tokens / 1e6:.2f}M"]
        cells.append(f"{point.flops_6nd / PFLOP_S_DAY:.2e}")
        if result.loss is None:
            cells.append(f"{result.state}{': ' + result.why if result.why else ''}")
        else:
            cells.append(f"{result.loss:.4f}")
        if trailing:
            cells.append("" if result.trailing_loss is None else f"{result.trailing_loss:.4f}")
        values = _scalars(sweep, result)
        cells += [values.get(name, "") for name in extra]
        rows.append([*cells, f"{result.seconds / 60:.1f}"])
    return headings, rows


def gap_rows(sweep: Sweep, results: list[Result], axis: str, metric: str) -> Rows:
    """By how much the first option of an axis is above each other one, run by run; below, where there are three runs
    or more, the mean with its standard error."""
    first, *others = sweep.file.axes[axis]
    rest = [name for name in sweep.file.axes if name not in (axis, *sweep.file.best_of)]
    rows: dict[str, list[str]] = {}
    gaps = gaps_to_first(sweep, results, axis, metric)
    for gap in gaps:
        options = [gap.first.point.options[name] for name in rest]
        row = rows.setdefault(gap.first.point.name, [*options, *[""] * len(others)])
        row[len(rest) + others.index(gap.option)] = f"{gap.value:+.4f}"
    means = [_mean([gap.value for gap in gaps if gap.option == other]) for other in others]
    if rest and any(means):
        rows["mean"] = ["mean", *[""] * (len(rest) - 1), *means]
    return [*rest, *(f"{metric.replace('_', ' ')}, {first} minus {other}" for other in others)], list(rows.values())


def _mean(values: list[float]) -> str:
    """Mean and standard error; nothing for fewer than three values."""
    if len(values) < 3:
        return ""
    return f"{statistics.mean(values):+.4f} ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}"


def provenance(results: list[Result]) -> list[str]:
    """Commits and machines of the runs, one line each."""
    counts = Counter(filter(None, (result.made_on for result in results)))
    return [f"{count} of {len(results)} runs: {made_on}" for made_on, count in counts.items()]


def _sizes(sweep: Sweep, point: Point | None = None) -> list[str]:
    """The columns of sizes, headings without a point: of a sweep with mixtures, active and all parameters."""
    if point is None:
        return ["active parameters", "all parameters"] if sweep.has_mixtures else ["parameters"]
    sizes = [point.parameters, point.total_parameters] if sweep.has_mixtures else [point.parameters]
    return [f"{size:,}" for size in sizes]


def law_rows(laws: list[Laws]) -> Rows:
    """The fitted laws, one line each."""
    rows = []
    for law in laws:
        for name, fit in (("6 N D", law.by_6nd), ("true FLOPs", law.by_true_flops)):
            if fit is not None:
                rows.append([law.option, law.metric, f"a C^b, C in PFLOP/s-days by {name}", f"a = {fit.a}, b = {fit.b}",
                             f"{fit.residual:.2%}", str(fit.runs)])  # fmt: skip
        terms = law.three_terms
        if terms is not None:
            values = f"E = {terms.e}, A = {terms.a}, alpha = {terms.alpha}, B = {terms.b}, beta = {terms.beta}"
            rows.append([law.option, law.metric, "E + A/N^alpha + B/D^beta", values, f"{terms.residual:.2%}",
                         str(terms.runs)])  # fmt: skip
    return ["runs of", "metric", "form", "values [2.5% to 97.5% of runs drawn anew]", "largest residual", "runs"], rows


def markdown(rows: Rows) -> str:
    """A Markdown table."""
    headings, lines = rows
    table = [headings, ["---"] * len(headings), *lines]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in table)


def _scalars(sweep: Sweep, result: Result) -> dict[str, str]:
    """Numbers at the top of further evaluation records that the sweep wants to see, named by their attention."""
    found = {}
    for record in result.tasks:
        for key, value in record.items():
            if isinstance(value, float) and any(fnmatchcase(key, wanted) for wanted in sweep.file.columns):
                found[f"{key.replace('_', ' ')}, {record['attention']}"] = f"{value:.4f}"
    return found


def _extra_columns(sweep: Sweep, results: list[Result]) -> list[str]:
    return list(dict.fromkeys(name for result in results for name in _scalars(sweep, result)))
