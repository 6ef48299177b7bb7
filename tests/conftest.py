"""Settings for all tests."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/assets/losses anew")


def pytest_configure(config: pytest.Config) -> None:
    if "not gpu" in config.option.markexpr:
        # The suite proves the CPU platform also on a machine with GPUs.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # The tests start processes of their own; threads beside them only get in each other's way.
    torch.set_num_threads(1)
