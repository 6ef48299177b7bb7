"""Pickles of a checkpoint, read by what knows only the classes of the format.

A pickle names functions and calls them, so whoever reads it as it is runs what a stranger wrote. A distributed
checkpoint has two kinds of pickles: `.metadata`, the list of what is stored where, and objects that are no tensors
(random states, Transformer Engine's extra states, steps and learning rates), which `torch.save` wrote. `SafeReader`
reads the first; `only_known_classes` lets megatron-core read both while it is open. Anything else that a pickle names
is refused before it is imported. The list of tensors is looked at as well: what is stored lies in files of this folder.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from moba_megatron.checkpoint.manifest import CheckpointError
from moba_megatron.config.inside import named_file

METADATA = ".metadata"
_DCP = "torch.distributed.checkpoint"
# What a list of tensors is made of, in PyTorch 2.1 and later and in megatron-core's own additions.
_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    f"{_DCP}.metadata": {
        *("Metadata", "MetadataIndex", "ChunkStorageMetadata", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    },
    f"{_DCP}.filesystem": {"_StorageInfo", "_StoragePrefix"},
    f"{_DCP}.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"},
    "torch.distributed._shard.sharded_tensor.metadata": {"TensorProperties", "MEM_FORMAT_ENCODING"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
}
# What random states and extra states are made of, beside what torch allows anyway.
_STATES = [
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    type(np.dtype(np.uint8)),
    (np.empty(0).__reduce__()[0], "numpy.core.multiarray._reconstruct"),
    (np.empty(0).__reduce__()[0], "numpy._core.multiarray._reconstruct"),
    io.BytesIO,
]


class UnsafePickle(CheckpointError):
    """A pickle that names something else than the classes of a checkpoint."""


class _KnownClasses(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if name not in _CLASSES.get(module, ()):
            raise UnsafePickle(f"it names {module}.{name}, which no checkpoint has: it could run code")
        return super().find_class(module, name)


class SafeReader(FileSystemReader):
    """PyTorch's reader of a checkpoint folder, with `.metadata` read by what knows only its classes.

    Its `read_metadata` raises UnsafePickle (a CheckpointError) for anything else in it, and CheckpointError for a
    damaged one or one that names files outside the folder.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return _read_metadata(self)


def read_objects(data: bytes | io.BytesIO) -> Any:
    """What `torch.save` wrote of an object that is not a tensor.

    Raises:
        UnsafePickle: it names something else than plain values, arrays and tensors.
    """
    with only_known_classes():
        return torch.load(io.BytesIO(data) if isinstance(data, bytes) else data, map_location="cpu")


@contextmanager
def only_known_classes() -> Iterator[None]:
    """While it is open, nothing that PyTorch or megatron-core load from a checkpoint may name other classes."""
    read_metadata, load = FileSystemReader.read_metadata, torch.load

    def checked_load(file: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(file, *args, **{**kwargs, "weights_only": True})
        except pickle.UnpicklingError as error:
            raise UnsafePickle(
                "an object in it is not a plain value, array or tensor, or is damaged, and could run code: "
                f"{_reason(error)}"
            ) from error

    FileSystemReader.read_metadata = lambda reader, *args, **kwargs: _read_metadata(reader)
    torch.load = checked_load
    try:
        with torch.serialization.safe_globals(_STATES):
            yield
    finally:
        FileSystemReader.read_metadata, torch.load = read_metadata, load


def check_format(folder: Path) -> None:
    """Raise CheckpointError if `metadata.json` asks for another format than torch_dist, whose readers are not these."""
    path = folder / "metadata.json"
    if not path.is_file():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        backends = found["sharded_backend"], found.get("common_backend", "torch")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if backends != ("torch_dist", "torch"):
        raise CheckpointError(f"{path} asks for the formats {backends}: only torch_dist is read")


def _read_metadata(reader: FileSystemReader) -> Metadata:
    """The list of what is stored where, looked at before anybody follows it."""
    folder = Path(reader.path)
    path = folder / METADATA
    try:
        with path.open("rb") as stream:
            metadata = _KnownClasses(stream).load()
    except UnsafePickle as error:
        raise UnsafePickle(f"{path} is not read: {error}") from error
    except OSError:
        raise
    except Exception as error:  # damaged pickles raise anything
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise CheckpointError(f"{path} is damaged: it is not a list of tensors")
    _check_places(path, metadata)
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = StorageMeta()
    metadata.storage_meta.load_id = reader.load_id
    return metadata


def _check_places(path: Path, metadata: Metadata) -> None:
    """Raise CheckpointError unless everything lies within files of the folder."""
    stored = metadata.storage_data
    if not isinstance(stored, dict):
        raise CheckpointError(f"{path} is damaged: it does not say where tensors are stored")
    sizes: dict[str, int] = {}
    try:
        for place in stored.values():
            name = place.relative_path
            if name not in sizes:
                file = named_file(path, name)
                sizes[name] = file.stat().st_size if file.is_file() else 0
            if getattr(place, "transform_descriptors", None):
                raise ValueError(f"{name} is stored in a coded form, which is not read")
            if place.offset < 0 or place.length < 0 or place.offset + place.length > sizes[name]:
                raise ValueError(
                    f"{path} places {place.length} bytes at {place.offset} of {name}, which has {sizes[name]}"
                )
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path.parent} is damaged or not to be trusted: {error}") from error


def _reason(error: Exception) -> str:
    """The line of torch's words that names what was refused."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "GLOBAL" in line or "nsupported" in line), lines[0] if lines else "")
