"""Tensors without data (device "meta") in place of those of a GPU: the host's own code runs, and any read of a value
raises. Kernels only tell their grids."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace

import pytest
import torch

from moba_megatron.ops import attention, backends


def record_launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """(kernel, grid) of every launch from now on, in order; no kernel runs."""
    import moba_megatron.ops.triton as kernels
    from moba_megatron.ops.triton import catalog

    names = {made.name for made in catalog.configurations(dtypes=[torch.bfloat16, torch.float32], head_sizes=[64])}
    found: list[tuple[str, tuple[int, ...]]] = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *_, **__: found.append((self.name, grid))

    for module in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{module.name}")
        for name in names & set(vars(module)):
            monkeypatch.setattr(module, name, Recorder(name))
    return found


def kernels_on_meta(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Let the backend `triton` take meta tensors as if they were on an H100, by its own host code and not by the shapes
    that PyTorch knows of our operators; returns its launches."""
    from moba_megatron.ops.triton import config

    to = torch.Tensor.to

    def to_without_a_wait(tensor, *args, **kwargs):
        """A copy from the host that is not asked for without a wait waits for all the work before it."""
        copied = to(tensor, *args, **kwargs)
        assert tensor.device == copied.device or kwargs.get("non_blocking"), "a blocking copy to the device"
        return copied

    monkeypatch.setattr(torch.Tensor, "to", to_without_a_wait)
    monkeypatch.setattr(config, "architecture_of", lambda tensor: 90)
    monkeypatch.setattr(attention, "is_traced", lambda q, backend: False)
    runs = replace(backends.BACKENDS["triton"], unavailable=lambda device: None)
    monkeypatch.setitem(backends.BACKENDS, "triton", runs)
    return record_launches(monkeypatch)
