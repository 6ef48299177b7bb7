"""Settings for all tests."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/assets/losses anew")


def pytest_configure() -> None:
    # The tests start processes of their own; threads beside them only get in each other's way.
    torch.set_num_threads(1)
