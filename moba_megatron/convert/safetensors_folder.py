"""The tensors of a Hugging Face folder, read slice by slice.

Opening a folder reads the headers of its files: names, shapes, dtypes. A slice of a tensor costs its own bytes only
(safetensors maps the file), so each rank reads its part of the files and no more. Pickle files (`.bin`) can run code
when they are opened, and are refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moba_megatron.checkpoint.finite import is_finite
from moba_megatron.config import ConfigError
from moba_megatron.config.huggingface import DOWNLOAD
from moba_megatron.config.inside import named_file

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = ("F32", "BF16", "F16")
# Constants that old Llama checkpoints carry; they follow from the configuration.
_IGNORED = ".rotary_emb.inv_freq"


class SafetensorsFolder:
    """Names, shapes and contents of `model.safetensors`, or of the files named by its index.

    Args:
        folder: the Hugging Face folder.

    Raises:
        ConfigError: no safetensors there, a damaged file, or an index that does not fit the files.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.files: dict[str, str] = {}
        """The file that holds each tensor."""
        self._open: tuple[str, Any] | None = None
        problems = self._read_headers()
        if problems:
            raise ConfigError([f"{self.folder}: {line}" for line in problems])

    def read(self, name: str, where: tuple[slice, ...] = ()) -> Tensor:
        """A part of a tensor: a view of the file, valid until another file is read. Copy it, do not change it.

        Raises:
            ConfigError: it holds infinities or NaN.
        """
        file = self.files[name]
        if self._open is None or self._open[0] != file:
            self._open = file, safe_open(self.folder / file, framework="pt")
        part = self._open[1].get_slice(name)
        tensor = part[where if len(where) != 1 else where[0]] if where else part[:]
        if not is_finite(tensor):
            raise ConfigError([f"{self.folder / file}: {name} is not finite (infinite or NaN): take other weights"])
        return tensor

    def problems(self, expected: dict[str, tuple[int, ...]]) -> list[str]:
        """Compare names, shapes and dtypes with those that a model needs; one line for each that does not fit."""
        lines = [f"{name} is missing" for name in expected if name not in self.shapes]
        lines += [f"{name} is not part of this model" for name in self.shapes if name not in expected]
        for name in expected.keys() & self.shapes.keys():
            if self.shapes[name] != expected[name]:
                lines.append(f"{name} has shape {list(self.shapes[name])}, this model needs {list(expected[name])}")
            if self.dtypes[name] not in _DTYPES:
                lines.append(
                    f"{name} has dtype {self.dtypes[name]}: {', '.join(_DTYPES)} are supported; take the bf16 model of "
                    "the same name"
                )
        return sorted(lines)

    def _read_headers(self) -> list[str]:
        index = self._index()
        problems = []
        for file in dict.fromkeys(index.values()) if index is not None else [SINGLE]:
            try:
                with safe_open(self.folder / file, framework="pt") as opened:
                    for name in opened.keys():
                        if name.endswith(_IGNORED):
                            continue
                        if name in self.files:
                            problems.append(f"{name} is in {self.files[name]} and in {file}")
                        part = opened.get_slice(name)
                        self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), part.get_dtype()
                        self.files[name] = file
            except (OSError, SafetensorError) as error:
                problems.append(f"{file} cannot be read: {error}; fetch it again ({DOWNLOAD} {self.folder})")
        if index is not None and not problems:
            problems += [
                f"{INDEX} says that {file} holds {name}, but it does not: fetch the folder again ({DOWNLOAD} "
                f"{self.folder})"
                for name, file in index.items()
                if not name.endswith(_IGNORED) and self.files.get(name) != file
            ]
        return problems

    def _index(self) -> dict[str, str] | None:
        """Tensor to file, where there are several files."""
        path = self.folder / INDEX
        if path.is_file():
            try:
                index = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
                for file in set(index.values()):
                    named_file(path, file)
                return index
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ConfigError([
                    f"{path} is damaged: {type(error).__name__}: {error}; fetch it again ({DOWNLOAD} {self.folder})"
                ]) from error  # fmt: skip
        if (self.folder / SINGLE).is_file():
            return None
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self.folder.glob(pattern))
        if pickled:
            raise ConfigError([
                f"{self.folder} holds its weights in {', '.join(pickled[:3])}: opening a pickle file can run code, so "
                "they are not read. If you trust their origin, convert them once: python -c \"from transformers "
                f"import AutoModelForCausalLM as M; M.from_pretrained('{self.folder}', dtype='auto')"
                ".save_pretrained('CONVERTED')\""
            ])  # fmt: skip
        raise ConfigError([self._without_weights()])

    def _without_weights(self) -> str:
        """The likely kind of a folder without weights, and the way to one with weights."""
        fetch = f"{DOWNLOAD} {self.folder}"
        if (self.folder / "adapter_config.json").is_file():
            return (
                f"{self.folder} holds an adapter, not a model: merge it into its model with peft (merge_and_unload) "
                f"and save_pretrained the result"
            )
        for pattern, what in (
            ("*.gguf", "GGUF files of llama.cpp"),
            ("consolidated*", "weights in the maker's own names"),
        ):
            if any(self.folder.glob(pattern)):
                return f"{self.folder} holds {what}: fetch the model in the format of transformers ({fetch})"
        return f"{self.folder} has neither {SINGLE} nor {INDEX}: fetch the weights: {fetch}"
