"""Where `prepare` works: OUTPUT.partial, its lock, and the rules for what may be replaced.

`OUTPUT.partial/plan.json` says which dataset the work belongs to (its identity) and which engine encodes. Work of the
same identity is continued, other work is refused unless `overwrite` is given. OUTPUT itself changes only by renames of
whole folders.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from moba_megatron.data.manifest import Manifest, load_manifest

Identity = dict[str, Any]


class Workspace:
    """The work folder of one dataset in the making. Use `open_workspace`."""

    def __init__(self, folder: Path, identity: Identity):
        self.folder = folder
        self.identity = identity
        self.tokenizer = folder / "tokenizer"
        self.shards = folder / "shards"
        self.dataset = folder / "dataset"

    @property
    def engine(self) -> tuple[str, str] | None:
        """(engine, reason) of the shards that are there, or None at the start."""
        stored = json.loads((self.folder / "plan.json").read_text())["engine"]
        return (stored[0], stored[1]) if stored else None

    def set_engine(self, engine: tuple[str, str] | None) -> None:
        plan, unfinished = self.folder / "plan.json", self.folder / "plan.unfinished"
        unfinished.write_text(json.dumps({"identity": self.identity, "engine": engine}, indent=2))
        unfinished.rename(plan)

    def publish(self, output: Path) -> None:
        """Give the finished dataset its name, then remove the work and a dataset that was replaced."""
        old = self.folder / "replaced"
        shutil.rmtree(old, ignore_errors=True)
        if output.exists():
            output.rename(old)
        self.dataset.rename(output)
        self.discard()

    def discard(self) -> None:
        """Remove the work folder; call it under the lock."""
        _empty(self.folder)
        # Only the lock is left. A run that opens the folder now makes a lock of its own, and with it the folder stays.
        shutil.rmtree(self.folder, ignore_errors=True)


def work_folder(output: Path) -> Path:
    """OUTPUT.partial, beside the output so that a rename is enough to publish."""
    return output.with_name(output.name + ".partial")


def existing_dataset(output: Path, identity: Identity, overwrite: bool) -> Manifest | None:
    """The manifest of an equal dataset in `output`; None if the place is free or may be replaced.

    Raises:
        ValueError: something else is there.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    manifest = load_manifest(output) if output.is_dir() else None
    if manifest is None:
        raise ValueError(f"{output} exists and is no prepared dataset: choose another output, or move it away")
    if manifest.identity == identity:
        return manifest
    if not overwrite:
        raise ValueError(
            f"{output} holds another dataset ({differences(manifest.identity, identity)}): choose another output, or "
            "replace it with --overwrite (overwrite=True)"
        )
    return None


@contextmanager
def open_workspace(output: Path, identity: Identity, overwrite: bool) -> Iterator[Workspace]:
    """The work folder for `output`, held by a lock; unfinished work of the same identity is kept.

    Raises:
        ValueError: another process is at it, or it holds unfinished work on something else.
    """
    space = Workspace(work_folder(output), identity)
    space.folder.mkdir(parents=True, exist_ok=True)
    with open(space.folder / "lock", "w") as lock:
        if not _try_lock(lock):
            raise ValueError(f"another process is preparing {output} at this moment (it holds {lock.name})")
        found = _identity_of(space.folder)
        if found is not None and found != identity and not overwrite:
            raise ValueError(
                f"{space.folder} is unfinished work on another dataset ({differences(found, identity)}): finish it "
                "with its own recipe, or discard it with --overwrite (overwrite=True)"
            )
        if found != identity:
            _empty(space.folder)
            space.set_engine(None)
        yield space


def differences(old: Identity, new: Identity, prefix: str = "") -> str:
    """Names of the keys in which two identities differ."""
    names = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names.append(differences(a, b, f"{prefix}{key}."))
        elif a != b:
            names.append(f"{prefix}{key}")
    return ", ".join(name for name in names if name)


def remove_leftovers(output: Path, identity: Identity) -> None:
    """Remove the work folder of a run that was killed between publishing its dataset and tidying up. One that is in use
    is left to its user."""
    space = Workspace(work_folder(output), identity)
    try:
        lock = open(space.folder / "lock", "r+")
    except FileNotFoundError:
        return
    with lock:
        if _try_lock(lock) and _identity_of(space.folder) == identity:
            space.discard()


def _try_lock(lock: TextIO) -> bool:
    """Lock an open file; False if another process holds it, or has removed it before it was locked here."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name))
    except (BlockingIOError, FileNotFoundError):
        return False


def _identity_of(folder: Path) -> Identity | None:
    plan = folder / "plan.json"
    return json.loads(plan.read_text())["identity"] if plan.is_file() else None


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()
