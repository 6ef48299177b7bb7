"""One parameter of a checkpoint at a time, without process groups, a model or a GPU.

megatron-core's distributed checkpoints are read with PyTorch's own reader. They keep all layers of a kind under one
key, [layers, ...], as one stored part a layer (and tensor-parallel rank), so one layer is read without the others.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from moba_megatron.checkpoint import CheckpointError
from moba_megatron.convert.mapping import layer_of


class StoredWeights:
    """The weights of a checkpoint folder by canonical name (see `mapping`).

    Raises:
        CheckpointError: the folder holds no distributed checkpoint.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._reader = FileSystemReader(folder)
        try:
            metadata = self._reader.read_metadata()
        except OSError as error:
            raise CheckpointError(f"{folder} holds no distributed checkpoint: {error}") from error
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer")
        }

    def names(self, num_layers: int) -> set[str]:
        """Canonical names of every stored parameter, if the model has so many layers."""
        names: set[str] = set()
        for key in self._tensors:
            head, layers, rest = key.partition("decoder.layers.")
            names |= {f"{head}{layers}{n}.{rest}" for n in range(num_layers)} if layers else {key}
        return names

    def dtype(self) -> torch.dtype:
        """The one dtype of the weights.

        Raises:
            CheckpointError: several.
        """
        dtypes = {entry.properties.dtype for entry in self._tensors.values()}
        if len(dtypes) != 1:
            raise CheckpointError(f"{self.folder} has weights of several dtypes: {sorted(map(str, dtypes))}")
        return dtypes.pop()

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A parameter, or where more rows are stored (padding of the vocabulary) its first ones.

        Raises:
            CheckpointError: it is stored in another shape.
        """
        layer, rest = layer_of(name)
        key = name if layer is None else f"decoder.layers.{rest}"
        entry = self._tensors[key]
        stored = tuple(entry.size) if layer is None else tuple(entry.size)[1:]
        if len(stored) != len(shape) or stored[1:] != shape[1:] or stored[0] < shape[0]:
            raise CheckpointError(f"{self.folder}: {name} is stored as {list(stored)}, the model has {list(shape)}")
        leading = () if layer is None else (1,)
        wanted = ChunkStorageMetadata(
            torch.Size([*([layer] if leading else []), *[0] * len(shape)]), torch.Size([*leading, *shape])
        )
        into = _Into(torch.empty(wanted.sizes, dtype=entry.properties.dtype))
        plan = LoadPlan(create_read_items_for_chunk_list(key, entry, [wanted]))
        self._reader.read_data(self._reader.prepare_local_plan(plan), into).wait()
        return into.tensor.view(shape)


class _Into:
    """Where the reader puts what it reads: the part of a planner that it calls."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        ranges = zip(item.dest_offsets, item.lengths, strict=True)
        return self.tensor[tuple(slice(start, start + length) for start, length in ranges)]

    def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None:
        """Nothing: the reader has copied into the tensor itself."""
