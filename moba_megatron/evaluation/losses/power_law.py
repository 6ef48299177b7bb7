"""The power law of loss against position: L(p) = a p^b + c (with b < 0), as long-context reports fit it.

p counts the tokens of a prediction's context, its own included, so the first prediction of a document is at p = 1. The
steeper and the longer the fall, the more the model makes of distance; c is what more context will not go below.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares

# Fewer points than this leave three parameters no room to be wrong.
LEAST_POINTS = 5


@dataclass
class PositionLaw:
    """L(p) = a p^b + c in nats per token, from positions `first` to `last`; `error` is the root mean square of what it
    misses, weighted by tokens."""

    a: float
    b: float
    c: float
    error: float
    first: float
    last: float

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "formula": self.formula}

    @property
    def formula(self) -> str:
        return f"{self.a:.3f} p^{self.b:.3f} + {self.c:.3f}"

    def at(self, positions: np.ndarray) -> np.ndarray:
        return self.a * positions**self.b + self.c


def fit_power_law(positions: list[float], losses: list[float], tokens: list[int]) -> PositionLaw | None:
    """The law closest to losses at positions, each weighted by the square root of its tokens (the size of its noise);
    single points far off pull little (soft L1). None for fewer than five positions, or losses that do not fall.

    Args:
        positions: from 1, rising.
        losses: nats per token.
        tokens: how many predictions each loss is the mean of.

    >>> p = [1, 2, 4, 8, 16, 32, 64]
    >>> law = fit_power_law(p, [3 * x**-0.5 + 2 for x in p], [100] * 7)
    >>> [round(value, 3) for value in (law.a, law.b, law.c)]
    [3.0, -0.5, 2.0]
    """
    if len(positions) < LEAST_POINTS:
        return None
    p, loss = np.asarray(positions, float), np.asarray(losses, float)
    weights = np.sqrt(np.asarray(tokens, float))
    weights /= np.sqrt(np.mean(weights**2))

    def misses(parameters: np.ndarray) -> np.ndarray:
        a, b, c = parameters
        return weights * (a * p**b + c - loss)

    start = [max(loss[0] - loss[-1], 0.1), -0.3, loss.min()]
    bounds = ([0.0, -4.0, 0.0], [np.inf, -1e-3, np.inf])
    start = np.clip(start, np.asarray(bounds[0]) + 1e-6, np.asarray(bounds[1]) - 1e-6)
    found = least_squares(misses, start, bounds=bounds, loss="soft_l1", f_scale=0.1, x_scale=[1.0, 0.1, 1.0])
    a, b, c = map(float, found.x)
    if a * (p[0] ** b - p[-1] ** b) < 1e-3:
        return None
    return PositionLaw(a, b, c, float(np.sqrt(np.mean(misses(found.x) ** 2))), float(p[0]), float(p[-1]))
