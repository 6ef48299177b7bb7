"""Settings for all tests."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/assets/losses anew")
    watch = "in Triton's interpreter: watch what every program loads and stores, on poisoned memory"
    parser.addoption("--memory-accesses", action="store_true", help=watch)


def pytest_configure(config: pytest.Config) -> None:
    if "not gpu" in config.option.markexpr:
        # The suite proves the CPU platform also on a machine with GPUs.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # The tests start processes of their own; threads beside them only get in each other's way.
    torch.set_num_threads(1)


def pytest_report_header() -> str:
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "triton")]
    try:
        # The one that is imported: PYTHONPATH may name another than the one that is installed.
        import megatron.core

        core = megatron.core.__version__
    except ImportError:  # the tests of the operator on a GPU do without
        core = "none"
    return f"Python {platform.python_version()}, megatron-core {core}, {', '.join(versions)}"


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several buckets of gradients in a tiny model, padded at their ends, where their reduction overlaps."""
    from moba_megatron.training import optimizer

    small = functools.partial(optimizer.DistributedDataParallelConfig, bucket_size=2000)
    monkeypatch.setattr(optimizer, "DistributedDataParallelConfig", small)
