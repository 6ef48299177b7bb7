"""Tensors and objects of a checkpoint folder one by one, without process groups or a model.

PyTorch's own reader reads megatron-core's distributed checkpoints. Pickles are read by an unpickler that knows only the
classes of the format (`pickles`). The list of tensors is compared with the stored bytes before memory is allocated.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import LoadPlan
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from moba_megatron.checkpoint.manifest import CheckpointError
from moba_megatron.checkpoint.pickles import SafeReader, check_format, read_objects


class StoredTensors:
    """What a checkpoint folder stores, by key.

    Attributes:
        tensors: shape, dtype and chunks of each tensor.
        objects: keys of what is not a tensor.

    Raises:
        CheckpointError: the folder holds no distributed checkpoint, a damaged one, or one whose list of tensors names
            more than the classes of the format.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        check_format(folder)
        self._reader = SafeReader(folder)
        try:
            metadata = self._reader.read_metadata()
        except OSError as error:
            raise CheckpointError(f"{folder} holds no distributed checkpoint: {error}") from error
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        entries = metadata.state_dict_metadata
        self.tensors = {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
        self.objects = [key for key, entry in entries.items() if isinstance(entry, BytesStorageMetadata)]

    def read(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A part of a tensor.

        Raises:
            CheckpointError: damaged, or not stored in whole.
        """
        entry, wanted = self.tensors[key], ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [wanted])
        if sum(math.prod(item.lengths) for item in items) != math.prod(wanted.sizes):
            raise CheckpointError(f"{self.folder}: {key} is not stored in whole, or in parts that overlap")
        self._check_room(key, entry, {item.storage_index for item in items})
        into = _Tensor(torch.empty(wanted.sizes, dtype=entry.properties.dtype))
        self._read(key, items, into)
        return into.tensor

    def parts(self, key: str) -> Iterator[tuple[ChunkStorageMetadata, Tensor]]:
        """A tensor part by part, as it is stored: never more than one in memory."""
        for chunk in self.tensors[key].chunks:
            yield chunk, self.read(key, chunk.offsets, chunk.sizes)

    def read_bytes(self, key: str) -> bytes:
        """An object as `torch.save` wrote it, not unpickled."""
        index, nothing = MetadataIndex(key), torch.Size((0,))
        into = _Bytes()
        self._read(key, [ReadItem(LoadItemType.BYTE_IO, index, nothing, index, nothing, nothing)], into)
        return into.value

    def read_object(self, key: str) -> Any:
        """An object.

        Raises:
            CheckpointError: damaged.
            UnsafePickle: it names more than the classes of the format.
        """
        try:
            return read_objects(self.read_bytes(key))
        except CheckpointError as error:
            raise type(error)(f"{self.folder}: {key}: {error}") from error
        except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{self.folder}: {key} cannot be read: {_first_line(error)}") from error

    def _read(self, key: str, items: list[ReadItem], into: _Tensor | _Bytes) -> None:
        try:
            self._reader.read_data(self._reader.prepare_local_plan(LoadPlan(items)), into).wait()
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, AssertionError, KeyError, OSError) as error:
            raise CheckpointError(f"{self.folder}: {key} cannot be read: {_first_line(error)}") from error

    def _check_room(self, key: str, entry: TensorStorageMetadata, indices: set[MetadataIndex]) -> None:
        """Raise CheckpointError if parts of a tensor take more bytes than are stored of them."""
        sizes = {tuple(chunk.offsets): math.prod(chunk.sizes) for chunk in entry.chunks}
        for index in indices:
            place = self._reader.storage_data.get(index)
            numbers = sizes.get(tuple(index.offset or ()), 0)
            if place is None or numbers * entry.properties.dtype.itemsize > place.length:
                raise CheckpointError(
                    f"{self.folder}: {key} should have {numbers} numbers, but only "
                    f"{0 if place is None else place.length} bytes are stored"
                )


class _Tensor:
    """Where the reader puts a tensor: the part of a planner that it calls."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        ranges = zip(item.dest_offsets, item.lengths, strict=True)
        return self.tensor[tuple(slice(start, start + length) for start, length in ranges)]

    def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None:
        """Nothing: the reader has copied into the tensor itself."""


class _Bytes:
    """Where the reader puts an object."""

    def __init__(self) -> None:
        self.value = b""

    def load_bytes(self, item: ReadItem, value: io.BytesIO) -> None:
        self.value = value.read()


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
