"""The precision of the operator: sums, scores and softmax in fp32 or wider, whatever surrounds the call.

`torch.autocast` would run the matrix products of fp32 inputs in bf16. A caller with fp32 inputs wants fp32, and the
selection must not depend on the context of the call. So all public functions here run with autocast off, and the
precision follows only from the inputs' dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of sums, scores and softmax for inputs of `dtype`: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _autocast_is_on(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function with autocast off for the device of its first tensor, given by position or by name."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next((x.device for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
        if device is None or not _autocast_is_on(device.type):
            return function(*args, **kwargs)
        with torch.autocast(device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapper
