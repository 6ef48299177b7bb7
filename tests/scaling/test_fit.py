"""Fits find the laws that made the numbers, and refuse what cannot be fitted."""

from __future__ import annotations

import numpy as np
import pytest

from moba_megatron.scaling.fit import chinchilla, power_law


def test_power_law_through_noise():
    compute = np.geomspace(1e-8, 1e-4, 8)
    random = np.random.default_rng(3)
    loss = 2.6 * compute**-0.063 * np.exp(random.normal(0, 0.002, 8))
    law = power_law(compute, loss)
    assert law.b.low < -0.063 < law.b.high and law.b.high - law.b.low < 0.004
    assert law.a.low < 2.6 < law.a.high
    assert law.residual < 0.01
    assert law(1e-6) == pytest.approx(2.6 * 1e-6**-0.063, rel=0.01)


def test_one_bad_run_does_not_carry_the_line():
    compute = np.geomspace(1, 1e4, 9)
    loss = 3 * compute**-0.1
    loss[-1] *= 1.3
    assert power_law(compute, loss).b.value == pytest.approx(-0.1, abs=0.01)
    # Plain least squares would be off by three times as much.
    assert abs(np.polyfit(np.log(compute), np.log(loss), 1)[0] + 0.1) > 0.01


def test_three_runs_have_no_interval():
    law = power_law(np.array([1.0, 10, 100]), np.array([4.0, 3, 2]))
    assert law.a.low is None and str(law.a) == f"{law.a.value:.4g}"


@pytest.mark.parametrize("compute, loss", [([1, 1, 2], [3, 3, 2]), ([1, 2, -3], [3, 2, 1]), ([1, 2, 3], [1, 0, 1])])
def test_no_power_law(compute, loss):
    with pytest.raises(ValueError):
        power_law(np.array(compute, float), np.array(loss, float))


def test_chinchilla_form():
    parameters, tokens = (grid.ravel() for grid in np.meshgrid(np.geomspace(1e5, 1e8, 5), np.geomspace(1e6, 1e10, 5)))
    loss = 1.7 + 400 / parameters**0.34 + 410 / tokens**0.28
    law = chinchilla(parameters, tokens, loss)
    assert law.residual < 2e-3
    assert law.alpha.value == pytest.approx(0.34, abs=0.02) and law.beta.value == pytest.approx(0.28, abs=0.02)
    assert law.e.value == pytest.approx(1.7, abs=0.1)
    # Far outside of the runs.
    assert law(1e10, 1e12) == pytest.approx(1.7 + 400 / 1e10**0.34 + 410 / 1e12**0.28, abs=0.05)


def test_tokens_that_follow_parameters_tell_no_two_terms_apart():
    parameters = np.geomspace(1e5, 1e8, 8)
    with pytest.raises(ValueError, match="fixed multiple"):
        chinchilla(parameters, 20 * parameters, parameters**-0.1)
    with pytest.raises(ValueError, match="six runs"):
        chinchilla(parameters[:5], parameters[:5] ** 2, parameters[:5] ** -0.1)
