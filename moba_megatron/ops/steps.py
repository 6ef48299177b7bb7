"""Which function does which step of MoBA: the parts of a backend that is sparse in time and memory.

| step | what | see |
|---|---|---|
| `summarize` | summaries of blocks | `ops.routing` |
| `select_past` | ids of the past blocks that each query attends | `ops.routing` |
| `attend` | attention with given ids in a whole pack, differentiable | `ops.gathered` |
| `attend_forward`, `attend_backward` | its two halves | `ops.gathered` |
| `accumulate`, `accumulate_backward` | attention of a fragment of the keys, merged into the rest | `ops.gathered` |
| `output_delta` | inner products of the output and its gradient, for the backward pass of fragments | `ops.gathered` |

All backends have the same signatures and contracts, written down where the table points.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

_ROUTING = ("summarize", "select_past")
# Backend: modules of its routing and of its attention.
_MODULES = {
    "gathered": ("moba_megatron.ops.routing", "moba_megatron.ops.gathered"),
    "triton": ("moba_megatron.ops.triton", "moba_megatron.ops.triton"),
}


class Steps(NamedTuple):
    """The steps of one backend; see the module."""

    summarize: Callable
    select_past: Callable
    attend: Callable
    attend_forward: Callable
    attend_backward: Callable
    accumulate: Callable
    accumulate_backward: Callable
    output_delta: Callable


def has_steps(backend: str) -> bool:
    """Whether a backend is made of these steps; others take whole calls only.

    >>> has_steps("gathered"), has_steps("reference")
    (True, False)
    """
    return backend in _MODULES


def steps_of(backend: str) -> Steps:
    """The steps of a backend for which `has_steps` holds. Imports what it needs: without a GPU nothing needs Triton."""
    routing, attention = map(importlib.import_module, _MODULES[backend])
    return Steps(*(getattr(routing if name in _ROUTING else attention, name) for name in Steps._fields))
