"""The checks of files that this start did not write: each is looked through once, by rank 0 alone.

`checked.json` in the folder of sample indices remembers which indices of datasets were found in order, by path, size
and time of change. `digests.json` holds digests of the sample indices themselves, which rank 0 compares whenever it
reads them: one that has changed is made anew.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moba_megatron.corpus.indexed import check_index
from moba_megatron.corpus.manifest import DatasetManifest
from moba_megatron.corpus.merge import file_hash

CHECKED, DIGESTS = "checked.json", "digests.json"
_ARRAYS = ("dataset_index", "dataset_sample_index", "document_index", "sample_index", "shuffle_index")


def check_once(prefix: str, manifest: DatasetManifest | None, folder: Path) -> None:
    """Look through PREFIX.idx, unless that was done before or is another rank's work.

    Args:
        manifest: of the dataset; its digest of the index is compared.
        folder: of the sample indices; where it is there, it remembers.

    Raises:
        ValueError: an index that is damaged, or another than the manifest knows.
    """
    if not first_rank():
        return
    path = Path(f"{prefix}.idx")
    file = manifest.files.get(path.name) if manifest else None
    status = path.stat()
    state = [status.st_size, status.st_mtime_ns, Path(f"{prefix}.bin").stat().st_size, file.hash if file else ""]
    known, key = _read(folder / CHECKED), os.path.realpath(path)
    if known.get(key) == state:
        return
    _look_through(prefix, *state)
    if folder.is_dir():
        _write(folder / CHECKED, {**known, key: state})


@functools.lru_cache
def _look_through(prefix: str, size: int, changed: int, data_size: int, digest: str) -> None:
    """See `check_once`; once a process, until the file changes."""
    if digest and file_hash(Path(f"{prefix}.idx")) != digest:
        raise ValueError(
            f"{prefix}.idx is not the file of manifest.json: its bytes have changed; copy it again, or prepare "
            "the data again"
        )
    check_index(prefix)


def first_rank() -> bool:
    """Whether this process is rank 0, also before there is a process group."""
    if torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def remove_changed(dataset: Any, folder: Path) -> list[str]:
    """Compare the sample indices of a dataset with their digests, and remove those that have changed or have no digest;
    the digests of indices that were just made are written down. Call under the folder's lock.

    Args:
        dataset: of megatron-core, or a blend of several.

    Returns:
        The names of the files that are gone: the dataset has to be built again.
    """
    known, gone = _read(folder / DIGESTS), []
    for name, loaded in _index_files(dataset):
        if not (folder / name).is_file():
            continue
        digest = file_hash(folder / name)
        if not loaded:
            known[name] = digest
        elif known.get(name) != digest:
            (folder / name).unlink()
            known.pop(name, None)
            gone.append(name)
    if known != _read(folder / DIGESTS):
        _write(folder / DIGESTS, known)
    return gone


def _index_files(dataset: Any) -> Iterator[tuple[str, bool]]:
    """The files of a dataset's indices as megatron-core names them, and whether they were read rather than made."""
    for part in [dataset, *getattr(dataset, "datasets", [])]:
        split = getattr(part, "index_split", None) or part.split
        for array in _ARRAYS:
            values = getattr(part, array, None)
            if values is not None:
                name = f"{part.unique_description_hash}-{type(part).__name__}-{split.name}-{array}.npy"
                yield name, isinstance(values, np.memmap)


def _read(path: Path) -> dict[str, Any]:
    """What was written down; nothing where that is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, values: dict[str, Any]) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
