"""The inputs of a run, found from any working directory: its tokenizer, of which it keeps a copy, and its data.

Relative paths of a configuration count from the working directory. If nothing exists there, they count from the working
directory of the run's last start (`environment.json`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from moba_megatron.checkpoint.find import saved_config
from moba_megatron.checkpoint.manifest import Manifest
from moba_megatron.config import BlendEntry, Config
from moba_megatron.convert.tokenizer_files import copy_tokenizer_files
from moba_megatron.corpus.tokenizer import Tokenizer
from moba_megatron.runs.environment import start_folder
from moba_megatron.runs.folder import RunFolder


def keep_tokenizer(source: Path, folder: RunFolder, step: int) -> None:
    """Copy a tokenizer into its run folder, whole or not at all. One that is there and gives other ids is kept under
    another name; one that gives the same stays.

    Args:
        source: the tokenizer that the run trains with.
        step: the step that the run goes on from.
    """
    kept, wanted = _fingerprint(folder.tokenizer), Tokenizer(source).fingerprint
    if kept == wanted:
        return
    unfinished = folder.path / f".tokenizer.{os.getpid()}.partial"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    copy_tokenizer_files(source, unfinished)
    if folder.tokenizer.exists():
        before = folder.path / f"tokenizer.until_step_{step}"
        shutil.rmtree(before, ignore_errors=True)
        folder.tokenizer.rename(before)
    unfinished.rename(folder.tokenizer)


def found_config(checkpoint: Path) -> Config:
    """As `saved_config`, with the paths of run folder, tokenizer and data as they are to be found from here.

    What is nowhere keeps the absolute path that it should have.
    """
    config = saved_config(checkpoint)
    folder, fingerprint = RunFolder.of(checkpoint), Manifest.read(checkpoint).data["tokenizer"]
    start = start_folder(folder)
    data = config.data

    def dataset(value: str | list[BlendEntry] | None) -> str | list[BlendEntry] | None:
        if isinstance(value, list):
            return [entry.model_copy(update={"path": _dataset(entry.path, start)}) for entry in value]
        return None if value is None else _dataset(value, start)

    tokenizer = _located(data.tokenizer, start, lambda path: (path / "tokenizer.json").is_file())
    if _fingerprint(folder.tokenizer) == fingerprint or not Path(tokenizer).is_dir() and folder.tokenizer.is_dir():
        tokenizer = str(folder.tokenizer)
    found = {"train": dataset(data.train), "validation": dataset(data.validation), "tokenizer": tokenizer}
    if data.index_cache is not None:
        found["index_cache"] = _located(data.index_cache, start, Path.is_dir)
    run = config.run.model_copy(update={"dir": str(folder.path)})
    return config.model_copy(update={"run": run, "data": data.model_copy(update=found)})


def _dataset(path: str, start: Path | None) -> str:
    return _located(path, start, lambda place: place.is_file() or Path(f"{place}.idx").is_file())


def _located(path: str, start: Path | None, is_there: Callable[[Path], bool]) -> str:
    """A path as it stands where something is there, else counted from the folder that the run was started in."""
    if start is None or os.path.isabs(path) or is_there(Path(path)):
        return path
    return str(start / path)


def _fingerprint(folder: Path) -> str | None:
    """Of the tokenizer in a folder; None if there is none that can be used."""
    try:
        return Tokenizer(folder).fingerprint
    except ValueError:
        return None
