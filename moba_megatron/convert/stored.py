"""One parameter of a checkpoint at a time, without process groups, a model or a GPU.

megatron-core's distributed checkpoints keep all layers of a kind under one key, [layers, ...], as one stored part a
layer (and tensor-parallel rank), so one layer is read without the others.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from moba_megatron.checkpoint import CheckpointError
from moba_megatron.checkpoint.finite import is_finite
from moba_megatron.checkpoint.manifest import NotFinite
from moba_megatron.checkpoint.tensors import StoredTensors
from moba_megatron.convert.mapping import EMBEDDING, OUTPUT, layer_of


class StoredWeights:
    """The weights of a checkpoint folder by canonical name (see `mapping`).

    Raises:
        CheckpointError: the folder holds no distributed checkpoint, a damaged one, or one whose list of tensors names
            more than the classes of the format.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._stored = StoredTensors(folder)
        self._tensors = {key: entry for key, entry in self._stored.tensors.items() if not key.startswith("optimizer")}

    def names(self, num_layers: int) -> set[str]:
        """Canonical names of every stored parameter, if the model has so many layers."""
        names: set[str] = set()
        for key in self._tensors:
            head, layers, rest = key.partition("decoder.layers.")
            names |= {f"{head}{layers}{n}.{rest}" for n in range(num_layers)} if layers else {key}
        return names

    def problems(self, shapes: dict[str, tuple[int, ...]], num_layers: int) -> list[str]:
        """How the stored parameters differ from those of a model, one line each; more rows of the vocabulary are none.

        Args:
            shapes: of every parameter of the model, by canonical name.
        """
        names = self.names(num_layers)
        found = [f"{name} is missing" for name in shapes if name not in names]
        found += [f"{name} is not part of the model" for name in sorted(names - shapes.keys())]
        for key, entry in self._tensors.items():
            layers = entry.size[0] if key.startswith("decoder.layers.") else num_layers
            if layers != num_layers:
                found.append(f"{layers} layers of {key} are stored, the model has {num_layers}")
        for name, shape in shapes.items():
            if name in names and not _holds(name, stored := self._entry(name)[1], shape):
                found.append(f"{name} is stored as {list(stored)}, the model has {list(shape)}")
        return found

    def _entry(self, name: str) -> tuple[str, tuple[int, ...]]:
        """The key that a parameter is stored under, and its stored shape."""
        layer, rest = layer_of(name)
        key = name if layer is None else f"decoder.layers.{rest}"
        size = tuple(self._tensors[key].size)
        return key, size if layer is None else size[1:]

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
            CheckpointError: it is stored in another shape, damaged, or not finite.
        """
        layer, _ = layer_of(name)
        key, stored = self._entry(name)
        if not _holds(name, stored, shape):
            raise CheckpointError(f"{self.folder}: {name} is stored as {list(stored)}, the model has {list(shape)}")
        offsets, sizes = ([], []) if layer is None else ([layer], [1])
        tensor = self._stored.read(key, [*offsets, *[0] * len(shape)], [*sizes, *shape])
        if not is_finite(tensor):
            raise NotFinite(f"{self.folder}: {name} is not finite (infinite or NaN): take another checkpoint")
        return tensor.view(shape)


def _holds(name: str, stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a stored parameter has this shape; the vocabulary may be padded."""
    padded = name in (EMBEDDING, OUTPUT) and stored[1:] == shape[1:] and stored[0] >= shape[0]
    return padded or stored == shape
