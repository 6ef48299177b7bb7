"""Checkpoints that a stranger has laid a payload into: pickles that make a folder when they are read as they are."""

from __future__ import annotations

import io
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moba_megatron.checkpoint.manifest import NAME, Manifest, digest_file


class Payload:
    """Makes a folder when it is unpickled by what trusts pickles."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def read_list(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def write_list(folder: Path, metadata: Any) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def in_list(folder: Path, payload: Payload) -> None:
    """Within `.metadata`, beside a list that is right."""
    metadata = read_list(folder)
    metadata.planner_data = {"more": payload}
    write_list(folder, metadata)


def instead_of_list(folder: Path, payload: Payload) -> None:
    write_list(folder, payload)


def in_objects(folder: Path, payload: Payload, kind: str) -> None:
    """In place of the objects of a kind, such as random states."""
    metadata = read_list(folder)
    written = io.BytesIO()
    torch.save([payload], written)
    for index, place in metadata.storage_data.items():
        if kind in index.fqn:
            path = folder / place.relative_path
            metadata.storage_data[index] = replace(place, offset=path.stat().st_size, length=len(written.getvalue()))
            with path.open("ab") as stream:
                stream.write(written.getvalue())
    write_list(folder, metadata)


def in_random_states(folder: Path, payload: Payload) -> None:
    in_objects(folder, payload, "random/")


def in_extra_states(folder: Path, payload: Payload) -> None:
    in_objects(folder, payload, "_extra_state/")


def in_common_state(folder: Path, payload: Payload) -> None:
    """In the steps and learning rates, wherever this release has them."""
    if (folder / "common.pt").is_file():
        torch.save(payload, folder / "common.pt")
    in_objects(folder, payload, "common_state/")


def sign(folder: Path) -> None:
    """Write sizes and digests anew, as whoever changes a checkpoint can."""
    manifest = Manifest.read(folder)
    files = {path.name: digest_file(path) for path in folder.iterdir() if path.name != NAME}
    replace(manifest, files=files).write(folder)


PLACES = (in_list, instead_of_list, in_random_states, in_extra_states, in_common_state)
