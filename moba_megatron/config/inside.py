"""Files that other files name: they lie in the same folder, or are not opened."""

from __future__ import annotations

import os
from pathlib import Path


def named_file(by: Path, name: object) -> Path:
    """The path of a file that another file names; it need not exist.

    A link counts as what it leads to: within the folder, or to where the file that names it really lies (the cache of
    the Hugging Face hub is made of such links).

    Args:
        by: the file that holds the name.

    Raises:
        ValueError: it is not a name, or leads out of the folder.
    """
    if not isinstance(name, str) or not name.strip("./") or "\0" in name:
        raise ValueError(f"{by} names the file {name!r}, which is not a file name")
    path = by.parent / name
    folders = (os.path.realpath(by.parent), os.path.dirname(os.path.realpath(by)))
    real = os.path.realpath(path)
    if os.path.isabs(name) or ".." in Path(name).parts or not any(_within(real, folder) for folder in folders):
        raise ValueError(f"{by} names the file {name!r}, which leads out of its folder: only files in it are read")
    return path


def _within(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip("/") + "/")
