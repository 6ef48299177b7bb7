"""Where `prepare` works: OUTPUT.partial, its lock, and the rules for what may be replaced.

`OUTPUT.partial/plan.json` names the dataset of the work (its identity), the number of shares and the encoding engine.
Work of the same identity is continued, other work is refused unless `overwrite` is given. OUTPUT itself changes only by
renames of whole folders.

A process that does all the work holds `lock` exclusively. Processes that do one share each, on one machine or many,
hold it together, and each its own `lock.I-of-N`; what they make for all, they make under `lock.common`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from pydantic import ValidationError

from moba_megatron.corpus.manifest import DatasetManifest, load_manifest
from moba_megatron.corpus.recipe import Recipe, recipe_identity

Identity = dict[str, Any]
_LAYOUT = 2
"""To be raised when parts come to be cut otherwise, or shards to hold other files."""
_PATIENCE = 10.0
"""Seconds that a share waits for the first one to look at the folder."""


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
        stored = _plan_of(self.folder)["engine"]
        return (stored[0], stored[1]) if stored else None

    def set_engine(self, engine: tuple[str, str] | None) -> None:
        self._write(engine, _plan_of(self.folder)["shares"])

    def start(self, shares: int) -> None:
        """Divide the work into shares; nothing encoded is lost."""
        plan = _plan_of(self.folder)
        self._write(plan["engine"] if plan and plan["identity"] == self.identity else None, shares)

    def _write(self, engine: tuple[str, str] | None, shares: int) -> None:
        plan = {"layout": _LAYOUT, "identity": self.identity, "shares": shares, "engine": engine}
        unfinished = self.folder / f"plan.{socket.gethostname()}.{os.getpid()}"
        unfinished.write_text(json.dumps(plan, indent=2), encoding="utf-8")
        unfinished.rename(self.folder / "plan.json")

    @contextmanager
    def common(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Work that only one process at a time may do. `waiting` is called if another one is at it."""
        with open(self.folder / "lock.common", "w", encoding="utf-8") as lock:
            if not _try_lock(lock):
                waiting()
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

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


def real_output(output: Path) -> Path:
    """The folder that is to be made: what a link leads to, so that work and result are on the disk that is meant.

    Raises:
        ValueError: it is a mount point, which cannot take its name by one rename, or a link to itself.
    """
    try:
        real = output.resolve() if output.is_symlink() else output
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{output} is a broken link: {error}") from error
    if Path(os.path.abspath(real)).is_mount():
        raise ValueError(
            f"{output} is a mount point, which a finished folder cannot replace: name a folder in it, such as "
            f"{output / 'data'}"
        )
    return real


def work_folder(output: Path) -> Path:
    """OUTPUT.partial, beside the output so that a rename is enough to publish."""
    return output.with_name(output.name + ".partial")


def existing_dataset(output: Path, identity: Identity, overwrite: bool) -> DatasetManifest | None:
    """The manifest of an equal dataset in `output`; None if the place is free or may be replaced.

    Raises:
        ValueError: something else is there.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    manifest = load_manifest(output) if output.is_dir() else None
    if manifest is None:
        raise ValueError(f"{output} exists and is not a prepared dataset: choose another output, or move it away")
    found = _in_words_of_today(manifest.identity)
    if found == identity:
        return manifest
    if not overwrite:
        raise ValueError(
            f"{output} holds another dataset ({differences(found, identity)}): choose another output, or "
            "replace it with --overwrite (overwrite=True)"
        )
    return None


@contextmanager
def open_workspace(
    output: Path, identity: Identity, overwrite: bool, share: tuple[int, int] | None = None
) -> Iterator[Workspace]:
    """The work folder for `output`, held by a lock; unfinished work of the same identity is kept.

    Args:
        share: (i, n) for one share of n; other shares may be in use at the same time. None: all of the work.

    Raises:
        ValueError: another process is at it, or it holds unfinished work on something else.
    """
    space = Workspace(work_folder(output), identity)
    space.folder.mkdir(parents=True, exist_ok=True)
    with open(space.folder / "lock", "w", encoding="utf-8") as lock:
        if _try_lock(lock):
            _claim(space, overwrite, share[1] if share else 1)
            free = share is None or _try_lock(lock, shared=True)
        else:
            free = share is not None and _join(lock, space, share[1])
        if not free:
            raise ValueError(f"another process is preparing {output} at this moment (it holds {lock.name})")
        if share is None:
            yield space
            return
        with open(space.folder / f"lock.{share[0]}-of-{share[1]}", "w", encoding="utf-8") as own:
            if not _try_lock(own):
                raise ValueError(f"another process prepares share {share[0]}/{share[1]} of {output} (see {own.name})")
            yield space


@contextmanager
def hold(folder: Path, output: Path) -> Iterator[str]:
    """A work folder for `output`, made empty, for this process alone; removed at the end unless it was renamed.

    Yields:
        The name of the lock in it.

    Raises:
        ValueError: another process is at it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        if not _try_lock(lock):
            raise ValueError(f"another process is making {output} at this moment (it holds {lock.name})")
        try:
            _empty(folder)
            yield "lock"
        finally:
            # Once it was renamed, a folder of that name is another process's.
            if _try_lock(lock):
                shutil.rmtree(folder)


def _claim(space: Workspace, overwrite: bool, shares: int) -> None:
    """Continue, start or replace the work in a folder that nobody else uses."""
    found = _plan_of(space.folder)
    same = bool(found) and found.get("layout") == _LAYOUT and found["identity"] == space.identity
    if found and not same and not overwrite:
        names = differences(found["identity"], space.identity) or "made by another version"
        raise ValueError(
            f"{space.folder} is unfinished work on another dataset ({names}): finish it with its own recipe, or "
            "discard it with --overwrite (overwrite=True)"
        )
    if not same:
        _empty(space.folder)
    space.start(shares)


def _join(lock: TextIO, space: Workspace, shares: int) -> bool:
    """Share the lock with processes that do other shares; False if one that does all of the work holds it."""
    # The first one to come holds it alone while it looks at the folder.
    deadline = time.monotonic() + _PATIENCE
    while not _try_lock(lock, shared=True):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    found = _plan_of(space.folder)
    if not found or found["identity"] != space.identity or found["shares"] != shares:
        what = f"{found['shares']} shares" if found and found["identity"] == space.identity else "another dataset"
        raise ValueError(f"other processes are preparing {what} in {space.folder}: wait for them, or stop them")
    return True


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
        lock = open(space.folder / "lock", "r+", encoding="utf-8")
    except FileNotFoundError:
        return
    with lock:
        if _try_lock(lock) and _plan_of(space.folder).get("identity") == identity:
            space.discard()


def is_unfinished(output: Path, identity: Identity) -> bool:
    """Whether there is work under way for `output` on another dataset than the one of `identity`, which it holds."""
    found = _plan_of(work_folder(output))
    return bool(found) and found["identity"] != identity


def unfinished_identity(output: Path) -> Identity:
    """The identity of the work that is under way for `output`.

    Raises:
        ValueError: there is no unfinished work.
    """
    found = _plan_of(work_folder(output))
    if not found:
        raise ValueError(f"{work_folder(output)} holds no unfinished work: prepare its shares first (--shard i/n)")
    return found["identity"]


def _in_words_of_today(identity: Identity) -> Identity:
    """An identity that an older version wrote, with the keys that recipes have got since, at their defaults."""
    try:
        return identity | {"recipe": recipe_identity(Recipe.model_validate(identity["recipe"]))}
    except (KeyError, ValidationError):
        return identity


def _try_lock(lock: TextIO, shared: bool = False) -> bool:
    """Lock an open file; False if another process holds it, or has removed it before it was locked here."""
    try:
        fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(lock.fileno()), os.stat(lock.name))
    except (BlockingIOError, FileNotFoundError):
        return False


def _plan_of(folder: Path) -> dict[str, Any]:
    """Contents of plan.json; empty without one."""
    plan = folder / "plan.json"
    if not plan.is_file():
        return {}
    try:
        found = json.loads(plan.read_bytes())
        # Other versions have other keys besides.
        needed = {"identity", "shares"} if found.get("layout") == _LAYOUT else {"identity"}
        if not needed <= found.keys():
            raise ValueError("keys are missing")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{plan} is damaged ({error}): its dataset is unknown; remove {folder}, and run again"
        ) from error
    return found


def _empty(folder: Path) -> None:
    # The plan goes last: as long as it is there, a killed run's leftovers are known for what they are.
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "plan.json"):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()
