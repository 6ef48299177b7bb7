"""Which function does which step of MoBA: the parts of a backend that is sparse in time and memory.

| step | what | see |
|---|---|---|
| `summary` | what a block shows of its keys; None where nothing is asked for | `ops.summaries` |
| `summarize` | summaries of blocks | `ops.routing` |
| `select_past` | ids of the past blocks that each query attends | `ops.routing` |
| `attend` | attention with given ids in a whole pack, differentiable | `ops.gathered` |
| `attend_forward`, `attend_backward` | its two halves | `ops.gathered` |
| `accumulate`, `accumulate_backward` | attention of a fragment of the keys, merged into the rest | `ops.gathered` |
| `output_delta` | inner products of the output and its gradient, for the backward pass of fragments | `ops.gathered` |

All backends have the same signatures and contracts, written down where the table points. Attention knows only ids:
kernels that choose by top-k of the means alone leave every other selection to the portable routing, which runs on any
device.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

from moba_megatron.ops import routing
from moba_megatron.ops.selection import MOBA, Selection
from moba_megatron.ops.summaries import Summary

# Backend: modules of its routing and of its attention.
_MODULES = {
    "gathered": ("moba_megatron.ops.routing", "moba_megatron.ops.gathered"),
    "triton": ("moba_megatron.ops.triton", "moba_megatron.ops.triton"),
}


class Steps(NamedTuple):
    """The steps of one backend for one selection; see the module."""

    summary: Summary | None
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


def steps_of(backend: str, selection: Selection = MOBA) -> Steps:
    """The steps of a backend for which `has_steps` holds. Imports what it needs: without a GPU nothing needs Triton."""
    own_routing, attention = map(importlib.import_module, _MODULES[backend])
    summary = selection.make_summary()
    if selection.is_plain:
        summarize, select_past = own_routing.summarize, own_routing.select_past
    else:
        summarize = functools.partial(routing.summarize, summary=summary)
        select_past = functools.partial(routing.select_past, selector=selection.make_selector(), summary=summary)
    return Steps(summary, summarize, select_past, *(getattr(attention, name) for name in Steps._fields[3:]))
