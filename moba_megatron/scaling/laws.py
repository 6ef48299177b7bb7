"""The laws of a sweep: a fit for each option of the compared axis, with what was left out of it and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from moba_megatron.scaling.fit import Chinchilla, PowerLaw, chinchilla, power_law
from moba_megatron.scaling.results import Result, best
from moba_megatron.scaling.sweep import PFLOP_S_DAY, Sweep


@dataclass(frozen=True)
class Laws:
    """Fits of one metric for the runs of one option, such as MoBA.

    Attributes:
        by_6nd, by_true_flops: loss against compute in PFLOP/s-days, counted as 6 N D and with attention by its pairs;
            None with the reason in `problems`.
        three_terms: loss against parameters (of a mixture of experts the active ones) and tokens; likewise.
    """

    option: str
    metric: str
    by_6nd: PowerLaw | None
    by_true_flops: PowerLaw | None
    three_terms: Chinchilla | None
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fit_sweep(sweep: Sweep, results: list[Result], axis: str, metric: str) -> list[Laws]:
    """Fit the finished runs of each option of `axis`. See `left_out` for the others."""
    chosen = best(results, sweep.file.best_of, metric)
    return [
        _laws(option, metric, [r for r in chosen if r.point.options[axis] == option])
        for option in sweep.file.axes[axis]
    ]  # fmt: skip


@dataclass(frozen=True)
class Gap:
    """Loss of the first option of an axis minus that of another, between two runs that agree in all other axes."""

    first: Result
    option: str
    value: float


def gaps_to_first(sweep: Sweep, results: list[Result], axis: str, metric: str) -> list[Gap]:
    """The gaps of an axis, in the order of the runs."""
    first, ignored = next(iter(sweep.file.axes[axis])), {axis, *sweep.file.best_of}

    def rest(result: Result) -> tuple[str, ...]:
        return tuple(option for name, option in result.point.options.items() if name not in ignored)

    known = best(results, sweep.file.best_of, metric)
    base = {rest(result): result for result in known if result.point.options[axis] == first}
    pairs = [(base.get(rest(result)), result) for result in known if result.point.options[axis] != first]
    return [
        Gap(one, other.point.options[axis], one.metric(metric) - other.metric(metric))
        for one, other in pairs
        if one is not None
    ]


def left_out(results: list[Result], metric: str) -> list[str]:
    """The runs that a fit of this metric cannot use, with the reason: never dropped in silence."""
    lines = []
    for result in results:
        if result.state != "finished":
            why = f": {result.why}" if result.why else f" at step {result.step}" if result.step else ""
            lines.append(f"{result.point.name}: {result.state}{why}")
        elif result.metric(metric) is None:
            why = "no validation document fills the window" if metric == "trailing_loss" else "no evaluation gave it"
            lines.append(f"{result.point.name}: no {metric}: {why}")
    return lines


def _laws(option: str, metric: str, results: list[Result]) -> Laws:
    loss = np.array([result.metric(metric) for result in results], float)
    problems: list[str] = []

    def attempt(name: str, fit: Any, *values: np.ndarray) -> Any:
        try:
            return fit(*values, loss)
        except ValueError as error:
            problems.append(f"{option}, {name}: {error}")
            return None

    column = {
        name: np.array([getattr(result.point, name) for result in results], float)
        for name in ("flops_6nd", "flops_true", "parameters", "tokens")
    }
    return Laws(
        option,
        metric,
        attempt("L(C), 6 N D", power_law, column["flops_6nd"] / PFLOP_S_DAY),
        attempt("L(C), true FLOPs", power_law, column["flops_true"] / PFLOP_S_DAY),
        attempt("L(N, D)", chinchilla, column["parameters"], column["tokens"]),
        problems,
    )
