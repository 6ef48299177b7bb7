"""Everything that can be wrong with a checkpoint folder, found without a model or a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moba_megatron.checkpoint.common_state import COMMON_FILE
from moba_megatron.checkpoint.finite import LARGEST_WEIGHT, is_finite
from moba_megatron.checkpoint.manifest import CheckpointError, Manifest, verify
from moba_megatron.checkpoint.pickles import read_objects
from moba_megatron.checkpoint.tensors import StoredTensors


def damages(folder: Path, advance: Callable[[str], None] = lambda what: None) -> list[str]:
    """What is wrong with a checkpoint, one line each; empty for one that is as it was written.

    Files are compared with the manifest's digests, objects are read by what knows only the classes of the format, and
    every number of every tensor is looked at.

    Args:
        advance: told what is read next.
    """
    advance("digests")
    try:
        manifest = Manifest.read(folder)
        problems = verify(folder, manifest)
    except (CheckpointError, OSError) as error:
        return [str(error)]
    try:
        stored = StoredTensors(folder)
    except CheckpointError as error:
        return [*problems, str(error)]
    problems += _objects(folder, stored)
    for key in stored.tensors:
        advance(key)
        problems += _tensor(stored, key)
    return problems


def _objects(folder: Path, stored: StoredTensors) -> list[str]:
    found = []
    common = folder / COMMON_FILE
    if common.is_file():
        try:
            read_objects(common.read_bytes())
        except Exception as error:  # a damaged pickle raises anything
            found.append(f"{COMMON_FILE}: {error}")
    for key in stored.objects:
        try:
            stored.read_object(key)
        except CheckpointError as error:
            found.append(str(error))
    return found


def _tensor(stored: StoredTensors, key: str) -> list[str]:
    largest = {"largest": LARGEST_WEIGHT} if is_weight(key) else {}
    try:
        bad = any(not is_finite(part, **largest) for _, part in stored.parts(key))
    except CheckpointError as error:
        return [str(error)]
    return [f"{key} is not finite (infinite or NaN)"] if bad else []


def is_weight(key: str) -> bool:
    """Whether a stored tensor is one of the model, and not state of its optimizer."""
    return not key.startswith("optimizer")
