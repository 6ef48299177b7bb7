"""The folder of a split's sample indices: the configured one, else beside the data, else in the run folder."""

from __future__ import annotations

import os
from pathlib import Path

from moba_megatron.config import Config
from moba_megatron.config.paths import counted_from
from moba_megatron.corpus.blend import blend_entries

INDEX_CACHE = "index_cache"


def index_folder(config: Config, key: str) -> Path:
    """The folder for `train` or `validation`, made or not."""
    if config.data.index_cache is not None:
        return Path(config.data.index_cache)
    beside = _beside(config, key)
    return beside if writable(beside) else Path(config.run.dir) / INDEX_CACHE


def index_lines(config: Config) -> list[str]:
    """Notes on the folders, one line for each split whose indices are not beside the data."""
    if config.data.index_cache is not None:
        return []
    keys = [key for key in ("train", "validation") if getattr(config.data, key)]
    return [
        f"data.index_cache: {index_folder(config, key)} (the folder of data.{key} is not writable)"
        for key in keys
        if index_folder(config, key) != _beside(config, key)
    ]


def check_index_folder(config: Config, key: str) -> list[str]:
    """The problem that prevents writing indices of a split, with its fix; empty if nothing does.

    Raises:
        ConfigError: an empty blend.
    """
    if not getattr(config.data, key) or writable(folder := index_folder(config, key)):
        return []
    fix = "set data.index_cache to a writable folder on a disk that all machines see"
    if config.data.index_cache is not None:
        return [f"data.index_cache = {folder} is not writable: {fix}{counted_from(folder)}"]
    return [f"data.{key}: neither {_beside(config, key)} nor {folder} is writable: {fix}"]


def writable(folder: Path) -> bool:
    """Whether this process may write indices and the lock in a folder, or make it."""
    if folder.exists():
        lock = folder / "lock"
        return _may_write(folder) and (not lock.exists() or os.access(lock, os.W_OK))
    return _may_write(next(place for place in folder.absolute().parents if place.exists()))


def _may_write(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _beside(config: Config, key: str) -> Path:
    return Path(blend_entries(getattr(config.data, key))[0].path).parent / INDEX_CACHE
