"""What a checkpoint holds and how two differ, read part by part: no more than one stored part is in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moba_megatron.checkpoint.damage import is_weight
from moba_megatron.checkpoint.manifest import Manifest
from moba_megatron.checkpoint.tensors import StoredTensors

Advance = Callable[[str], None]


@dataclass(frozen=True)
class TensorFacts:
    """A tensor as it is stored.

    Attributes:
        parts: how many pieces it is stored in (layers, ranks).
        norm: the root of the sum of squares, in fp64.
        largest: of the absolute values; infinite or NaN where one of them is.
    """

    key: str
    shape: tuple[int, ...]
    dtype: str
    parts: int
    norm: float
    largest: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.norm)


@dataclass(frozen=True)
class TensorDifference:
    """How a tensor differs between two checkpoints: `largest` and `norm` of the difference, and the norm of the first
    tensor. `why` says why there are no numbers, where there are none."""

    key: str
    largest: float = math.nan
    norm: float = math.nan
    first_norm: float = math.nan
    why: str = ""

    @property
    def same(self) -> bool:
        """Bit for bit, up to the sign of zero."""
        return not self.why and self.largest == 0


def tensor_facts(folder: Path, *, optimizer: bool = False, advance: Advance = lambda what: None) -> list[TensorFacts]:
    """Facts of all weights of a checkpoint, in the order of their names; of the optimizer's state, too, if asked.

    Raises:
        CheckpointError: what is stored cannot be read.
    """
    stored = StoredTensors(folder)
    found = []
    for key in sorted(stored.tensors):
        if not (optimizer or is_weight(key)):
            continue
        advance(key)
        squares, largest = 0.0, 0.0
        for _, part in stored.parts(key):
            squares += _norm(part) ** 2
            largest = _larger(largest, part)
        entry = stored.tensors[key]
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        found.append(TensorFacts(key, tuple(entry.size), dtype, len(entry.chunks), math.sqrt(squares), largest))
    return found


def tensor_differences(
    first: Path, second: Path, *, optimizer: bool = False, advance: Advance = lambda what: None
) -> list[TensorDifference]:
    """How the tensors of two checkpoints differ, the largest difference first. Their layouts may differ.

    Raises:
        CheckpointError: what is stored cannot be read.
    """
    a, b = StoredTensors(first), StoredTensors(second)
    found = []
    for key in sorted(a.tensors.keys() | b.tensors.keys()):
        if optimizer or is_weight(key):
            advance(key)
            found.append(_difference(key, a, b))
    return sorted(found, key=_rank)


def setting_differences(first: Manifest, second: Manifest) -> dict[str, tuple[Any, Any]]:
    """What two manifests say differently, but for their files: values by dotted key, None where one has nothing."""
    a, b = _flatten(_compared(first)), _flatten(_compared(second))
    return {key: (a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)}


def _difference(key: str, a: StoredTensors, b: StoredTensors) -> TensorDifference:
    if key not in a.tensors or key not in b.tensors:
        return TensorDifference(key, why=f"only in the {'first' if key in a.tensors else 'second'}")
    shapes = [list(stored.tensors[key].size) for stored in (a, b)]
    if shapes[0] != shapes[1]:
        return TensorDifference(key, why=f"{shapes[0]} against {shapes[1]}")
    largest, squares, own = 0.0, 0.0, 0.0
    for chunk, part in a.parts(key):
        other = b.read(key, chunk.offsets, chunk.sizes)
        own += _norm(part) ** 2
        # Equal infinities do not differ.
        change = torch.where(part == other, 0.0, part.double() - other.double())
        squares += _norm(change) ** 2
        largest = _larger(largest, change)
    return TensorDifference(key, largest, math.sqrt(squares), math.sqrt(own))


def _rank(difference: TensorDifference) -> tuple[bool, float]:
    size = difference.largest
    return not difference.why, -math.inf if math.isnan(size) else -size


def _norm(tensor: torch.Tensor) -> float:
    return float(
        torch.linalg.vector_norm(tensor if tensor.is_floating_point() else tensor.double(), dtype=torch.double)
    )


def _larger(size: float, tensor: torch.Tensor) -> float:
    """The larger of a size and the absolute values of a tensor; NaN where there is one."""
    if not tensor.numel():
        return size
    low, high = (float(end) for end in tensor.aminmax())
    return math.nan if math.isnan(low) or math.isnan(size) else max(size, -low, high)


def _compared(manifest: Manifest) -> dict[str, Any]:
    names = ("step", "consumed_samples", "consumed_tokens", "config", "schedule", "data", "data_changes")
    names += ("skipped_batches", "versions")
    return {name: getattr(manifest, name) for name in names}


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    return dict(_leaves(tree, prefix))


def _leaves(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for name, part in tree.items():
            yield from _leaves(part, f"{prefix}.{name}".removeprefix("."))
    else:
        yield prefix, tree
