"""Check that all values of tensors are finite: not infinite or NaN, and weights not so large that the next computation
overflows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import WriteItem

from moba_megatron.checkpoint.manifest import NotFinite

_SHOWN = 5
# The square of a larger number is infinite in fp32, and so is the norm of what holds one.
LARGEST_WEIGHT = float(torch.finfo(torch.float32).max ** 0.5)


def is_finite(tensor: Tensor, largest: float = math.inf) -> bool:
    """Whether all numbers of a tensor are finite and none is over `largest`. Reads it once and allocates nothing of its
    size."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
        return True
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if tensor.element_size() == 1:
        # No arithmetic is defined for fp8.
        tensor = tensor.to(torch.float32)
    # A NaN comes through both.
    low, high = (float(end) for end in tensor.detach().aminmax())
    return math.isfinite(low) and math.isfinite(high) and max(-low, high) <= largest


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names, each once, of the tensors that hold infinities or NaN, or are weights (not state of an optimizer) over
    `LARGEST_WEIGHT`."""
    found = {}
    for name, tensor in tensors:
        if not is_finite(tensor, math.inf if name.startswith("optimizer") else LARGEST_WEIGHT):
            found[name] = None
    return list(found)


def list_of_names(names: Iterable[str]) -> str:
    """A few names of tensors, and how many more there are."""
    found = list(names)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more


def not_finite_anywhere(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """As `not_finite`, over the tensors of all ranks. Collective."""
    ranks: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(ranks, not_finite(tensors))
    return sorted({name for names in ranks for name in names})


def weights_not_finite(model: list[torch.nn.Module]) -> list[str]:
    """Names of the model's parameters, on any rank, that are not finite (see `not_finite`). Collective.

    Args:
        model: chunks of this rank, bare or wrapped.
    """
    return not_finite_anywhere(named for chunk in model for named in chunk.named_parameters())


def require_finite(tensors: Iterable[tuple[str, Tensor]], source: object) -> None:
    """Raise NotFinite on all ranks if what came from `source` is not finite on one. Collective."""
    if names := not_finite_anywhere(tensors):
        raise NotFinite(
            f"{source} holds numbers that are not finite (infinite, NaN, or weights over 1.8e19): "
            f"{list_of_names(names)}. Nothing can be trained, evaluated or generated with them: take another checkpoint"
        )


def named_tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in dictionaries and lists, however deep, by their place."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, dict | list):
        for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from named_tensors(part, f"{name}.{key}".removeprefix("."))


def written_tensors(found: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors within what megatron-core hands to its writer, with the names that they are stored under: pairs of a
    `WriteItem` and a tensor, however deep in lists and tuples."""
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], WriteItem):
        if isinstance(found[1], Tensor):
            yield found[0].index.fqn, found[1]
    elif isinstance(found, list | tuple):
        for part in found:
            yield from written_tensors(part)
