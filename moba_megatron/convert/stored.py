"""One parameter of a checkpoint at a time, without process groups, a model or a GPU.

megatron-core's distributed checkpoints keep all layers of a kind under one key, [layers, ...], as one stored part a
layer (and tensor-parallel rank), so one layer is read without the others. Where layers differ (some dense, some with
experts), each has keys of its own, with its number. All experts of a layer are under one key as well, [layers, experts,
...] or [experts, ...].
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from moba_megatron.checkpoint import CheckpointError
from moba_megatron.checkpoint.finite import is_finite
from moba_megatron.checkpoint.manifest import NotFinite
from moba_megatron.checkpoint.tensors import StoredTensors
from moba_megatron.config import ModelConfig
from moba_megatron.convert.expert_mapping import BIAS, expert_name, number_of_expert
from moba_megatron.convert.mapping import EMBEDDING, LOCAL_NORMS, OUTPUT, layer_of

_LAYERS, _EXPERTS = "decoder.layers.", "mlp.experts.experts."
_NUMBERED = re.compile(r"decoder\.layers\.(?P<layer>\d+)\.(?P<rest>.+)")


class StoredWeights:
    """The weights of a checkpoint folder by canonical name (see `mapping`).

    Raises:
        CheckpointError: the folder holds no distributed checkpoint, a damaged one, or one whose list of tensors names
            more than the classes of the format.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._stored = StoredTensors(folder)
        tensors = self._stored.tensors
        self._tensors = {key: entry for key, entry in tensors.items() if not key.startswith("optimizer")}

    def names(self, model: ModelConfig) -> set[str]:
        """Canonical names of every stored parameter, if the model has its layers and experts."""
        return {name for key in self._tensors for name in _names_under(key, model)}

    def problems(self, shapes: dict[str, tuple[int, ...]], model: ModelConfig) -> list[str]:
        """How the stored parameters differ from those of a model, one line each; more rows of the vocabulary are none.

        Args:
            shapes: of every parameter of the model, by canonical name.
        """
        names = self.names(model)
        found = [f"{name} is missing" for name in shapes if name not in names]
        found += [f"{name} is not part of the model" for name in sorted(names - shapes.keys())]
        for key, entry in self._tensors.items():
            stored = zip(_counted(key), _counts(key, model), entry.size, strict=False)
            found += [
                f"{number} {what} of {key} are stored, the model has {wanted}"
                for what, wanted, number in stored
                if number != wanted
            ]
        for name, shape in shapes.items():
            if name in names and not _holds(name, stored_shape := self._shape(name), shape):
                found.append(f"{name} is stored as {list(stored_shape)}, the model has {list(shape)}")
        return found

    def _place(self, name: str) -> tuple[str, list[int]]:
        """The key of a stored parameter, and its indices in the first dimensions of the stored tensor."""
        layer, rest = layer_of(name)
        if layer is None:
            return name, []
        number: list[int] = []
        if expert := number_of_expert(rest):
            number, rest = [expert[0]], f"{_EXPERTS}{expert[1]}.weight"
        for own in (rest, *(local for local, ours in LOCAL_NORMS.items() if ours == rest)):
            if f"{_LAYERS}{own}" in self._tensors:
                return f"{_LAYERS}{own}", [layer, *number]
            if f"{_LAYERS}{layer}.{own}" in self._tensors:
                return f"{_LAYERS}{layer}.{own}", number
        raise CheckpointError(f"{self.folder} has no {name}")

    def _shape(self, name: str) -> tuple[int, ...]:
        key, indices = self._place(name)
        return tuple(self._tensors[key].size)[len(indices) :]

    def dtype(self) -> torch.dtype:
        """The one dtype of the weights.

        Raises:
            CheckpointError: several.
        """
        # Biases of balanced routers are counts, in fp32 whatever the weights are in.
        dtypes = {entry.properties.dtype for key, entry in self._tensors.items() if not key.endswith(BIAS)}
        if len(dtypes) != 1:
            raise CheckpointError(f"{self.folder} has weights of several dtypes: {sorted(map(str, dtypes))}")
        return dtypes.pop()

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A parameter, or where more rows are stored (padding of the vocabulary) its first ones.

        Raises:
            CheckpointError: it is stored in another shape, damaged, or not finite.
        """
        (key, indices), stored = self._place(name), self._shape(name)
        if not _holds(name, stored, shape):
            raise CheckpointError(f"{self.folder}: {name} is stored as {list(stored)}, the model has {list(shape)}")
        tensor = self._stored.read(key, [*indices, *[0] * len(shape)], [*[1] * len(indices), *shape])
        if not is_finite(tensor):
            raise NotFinite(f"{self.folder}: {name} is not finite (infinite or NaN): take another checkpoint")
        return tensor.view(shape)


def _counted(key: str) -> list[str]:
    """What the first dimensions under a key count."""
    layers = key.startswith(_LAYERS) and not _NUMBERED.fullmatch(key)
    return ["layers"] * layers + ["experts"] * (_EXPERTS in key)


def _counts(key: str, model: ModelConfig) -> list[int]:
    """How many of these a model has."""
    own = {"layers": model.num_layers, "experts": model.num_moe_experts or 0}
    return [own[what] for what in _counted(key)]


def _names_under(key: str, model: ModelConfig) -> Iterator[str]:
    """Canonical names of the parameters under a key."""
    if not key.startswith(_LAYERS):
        yield key
        return
    numbered = _NUMBERED.fullmatch(key)
    rest = numbered["rest"] if numbered else key.removeprefix(_LAYERS)
    for indices in itertools.product(*map(range, _counts(key, model))):
        own = rest
        if rest.startswith(_EXPERTS):
            own = expert_name(indices[-1], rest.removeprefix(_EXPERTS).removesuffix(".weight"))
        yield f"{_LAYERS}{numbered['layer'] if numbered else indices[0]}.{LOCAL_NORMS.get(own, own)}"


def _holds(name: str, stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a stored parameter has this shape; the vocabulary may be padded."""
    padded = name in (EMBEDDING, OUTPUT) and stored[1:] == shape[1:] and stored[0] >= shape[0]
    return padded or stored == shape
