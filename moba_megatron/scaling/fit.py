"""Scaling laws from the runs of a sweep.

`power_law`: L(C) = a C^b, the straight line of the report's figure 3 (arXiv 2502.13189), by least squares of the
    logarithms under a soft-L1 loss, so one bad run does not dominate the fit.

`chinchilla`: L(N, D) = E + A / N^alpha + B / D^beta (arXiv 2203.15556, section 3.3 and appendix D.3), by the Huber loss
of the logarithms (delta 1e-3), minimised by L-BFGS from a grid of starts.

Intervals are percentiles of fits to resampled runs (bootstrap). They show how much the fit hangs on single runs; with
few runs they are wide, and they know nothing of the scatter between seeds.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares, minimize
from scipy.special import logsumexp

_DRAWS = 500
_STARTS = {
    "alpha": (0.0, 0.5, 1.0, 2.0),
    "beta": (0.0, 0.5, 1.0, 2.0),
    "log_e": (-1.0, 0.0, 1.0),
    "log_a": (0.0, 5.0, 10.0),
    "log_b": (0.0, 5.0, 10.0),
}
_HUBER_DELTA = 1e-3


@dataclass(frozen=True)
class Interval:
    """A fitted value with the 2.5% and 97.5% percentiles of the bootstrap, None where there are too few runs for
    one."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        return f"{self.value:.4g}" + ("" if self.low is None else f" [{self.low:.4g}, {self.high:.4g}]")


@dataclass(frozen=True)
class PowerLaw:
    """L(C) = a C^b; `residual` is the largest |log L - log fit| over the runs."""

    a: Interval
    b: Interval
    residual: float
    runs: int

    def __call__(self, compute: np.ndarray | float) -> np.ndarray | float:
        return self.a.value * np.asarray(compute, float) ** self.b.value

    def __str__(self) -> str:
        return f"{self.a.value:.3g} C^{self.b.value:.4f}"


@dataclass(frozen=True)
class Chinchilla:
    """L(N, D) = E + A / N^alpha + B / D^beta."""

    e: Interval
    a: Interval
    alpha: Interval
    b: Interval
    beta: Interval
    residual: float
    runs: int

    def __call__(self, parameters: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray | float:
        return (
            self.e.value + self.a.value / parameters**self.alpha.value + self.b.value / tokens**self.beta.value
        )  # fmt: skip


def power_law(compute: np.ndarray, loss: np.ndarray, seed: int = 0) -> PowerLaw:
    """Fit L(C) = a C^b.

    Args:
        compute: [runs] in any unit; `a` is the loss at 1 of it.
        loss: [runs] nats per token.

    Raises:
        ValueError: fewer than three different amounts of compute, or values that are not above 0.

    >>> law = power_law(np.array([1.0, 10.0, 100.0]), np.array([4.0, 2.0, 1.0]))
    >>> round(law.a.value, 3), round(law.b.value, 3)
    (4.0, -0.301)
    """
    compute, loss = _checked(compute, loss)
    if len(np.unique(compute)) < 3:
        raise ValueError(f"a power law needs runs at three amounts of compute or more, not {len(np.unique(compute))}")
    x, y = np.log(compute), np.log(loss)
    draws = [_line(x[d], y[d]) for d in _resamples(x, seed)]
    intercept, slope = _line(x, y)
    residual = np.abs(y - intercept - slope * x).max()
    a = _interval(float(np.exp(intercept)), [float(np.exp(draw[0])) for draw in draws])
    return PowerLaw(a, _interval(slope, [draw[1] for draw in draws]), float(residual), len(x))


def chinchilla(parameters: np.ndarray, tokens: np.ndarray, loss: np.ndarray, seed: int = 0) -> Chinchilla:
    """Fit L(N, D) = E + A / N^alpha + B / D^beta.

    Args:
        parameters, tokens, loss: [runs].

    Raises:
        ValueError: fewer than six runs, or tokens that are a fixed multiple of the parameters: then the two terms
            cannot be told apart.
    """
    parameters, loss = _checked(parameters, loss)
    tokens, _ = _checked(tokens, loss)
    if len(loss) < 6:
        raise ValueError(f"the three-term form has five unknowns and needs six runs or more, not {len(loss)}")
    n, d, y = np.log(parameters), np.log(tokens), np.log(loss)
    if np.ptp(d - n) < np.log(1.5):
        raise ValueError(
            "tokens are nearly a fixed multiple of parameters in all runs, so the effects of N and D cannot be "
            "separated: add an "
            "axis of tokens_per_parameter"
        )
    best = _best_start(n, d, y)
    draws = [_minimum(best, n[i], d[i], y[i]) for i in _resamples(n, seed, count=100)]
    values = _natural(best)
    spread = np.array([_natural(draw) for draw in draws])
    columns = spread.T if len(draws) else [[]] * len(values)
    intervals = [_interval(value, list(column)) for value, column in zip(values, columns, strict=True)]
    residual = np.abs(_log_loss(best, n, d) - y).max()
    return Chinchilla(*intervals, residual=float(residual), runs=len(y))


def _checked(x: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, loss = np.asarray(x, float), np.asarray(loss, float)
    if x.shape != loss.shape or not (np.all(x > 0) and np.all(loss > 0)):
        raise ValueError(f"a fit needs one value above 0 for each run, not {x} and losses {loss}")
    return x, loss


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Intercept and slope under soft-L1, the scale of a residual that counts as large being 0.01."""
    # Around the middle, so that intercept and slope do not pull on each other.
    middle = x.mean()
    found = least_squares(
        lambda p: p[0] + p[1] * (x - middle) - y, x0=[y.mean(), -0.1], loss="soft_l1", f_scale=0.01
    )  # fmt: skip
    height, slope = found.x
    return float(height - slope * middle), float(slope)


def _resamples(x: np.ndarray, seed: int, count: int = _DRAWS) -> list[np.ndarray]:
    """Draws of run numbers with replacement that keep at least three different x; none where every such draw would hold
    the same x."""
    if len(np.unique(x)) < 4:
        return []
    random, draws = np.random.default_rng(seed), []
    while len(draws) < count:
        draw = random.integers(0, len(x), len(x))
        if len(np.unique(x[draw])) >= 3:
            draws.append(draw)
    return draws


def _interval(value: float, draws: list[float]) -> Interval:
    if not draws:
        return Interval(float(value), None, None)
    low, high = np.percentile(draws, [2.5, 97.5])
    return Interval(float(value), float(low), float(high))


def _log_loss(p: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Log of the predicted loss; p = log E, log A, alpha, log B, beta."""
    terms = np.stack([np.full_like(n, p[0]), p[1] - p[2] * n, p[3] - p[4] * d])
    return logsumexp(terms, axis=0)


def _objective(p: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray) -> float:
    error = np.abs(_log_loss(p, n, d) - y)
    huber = np.where(error <= _HUBER_DELTA, 0.5 * error**2, _HUBER_DELTA * (error - 0.5 * _HUBER_DELTA))
    return float(huber.sum())


def _minimum(start: np.ndarray, n: np.ndarray, d: np.ndarray, y: np.ndarray) -> np.ndarray:
    # The objective is tiny, and L-BFGS stops at absolute tolerances.
    return minimize(lambda p: 1e6 * _objective(p, n, d, y), start, method="L-BFGS-B", bounds=_BOUNDS).x


_BOUNDS = [(-5, 3), (-5, 40), (0, 3), (-5, 40), (0, 3)]


def _best_start(n: np.ndarray, d: np.ndarray, y: np.ndarray) -> np.ndarray:
    grid = itertools.product(*(_STARTS[name] for name in ("log_e", "log_a", "alpha", "log_b", "beta")))
    starts = sorted((np.array(point) for point in grid), key=lambda p: _objective(p, n, d, y))
    # The best twenty of the grid: the others start far off and end in the same places, or worse ones.
    found = [_minimum(start, n, d, y) for start in starts[:20]]
    return min(found, key=lambda p: _objective(p, n, d, y))


def _natural(p: np.ndarray) -> tuple[float, float, float, float, float]:
    return float(np.exp(p[0])), float(np.exp(p[1])), float(p[2]), float(np.exp(p[3])), float(p[4])
