"""Settings for the tests of the kernels."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: minutes in Triton's interpreter; see test_interpreted.py")
