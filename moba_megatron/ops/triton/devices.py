"""Launching on the device where the tensors lie, whichever is current."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function with the device of its first tensor, given by position, as the current one."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        tensor = next(x for x in args if isinstance(x, torch.Tensor))
        with torch.cuda.device_of(tensor):
            return function(*args, **kwargs)

    return wrapper
