"""One temporary folder for each process, in which the libraries leave theirs: a later process finds it, and removes it
once nobody holds its lock, however the process ended that made it.

Python's multiprocessing makes a folder for its sockets and removes it at a regular end alone, which neither a kill nor
`os._exit` is. torchrun makes one that it never removes; our ranks lock it as well. wandb makes two when it is merely
imported, as megatron-core does; so it stays out of the way until a run has it switched on.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing.process
import os
import re
import shutil
import sys
import tempfile
from multiprocessing.util import Finalize
from pathlib import Path
from typing import TextIO

PREFIX = "moba-"
# What is ours, exactly: a run folder may begin with the same word, and has a file called lock.
_OURS = re.compile(r"moba-\d+-\w{8}")
_TORCHRUN = "torchelastic_"
LOCK = ".moba_temporary"
_LONGEST = 80
"""Characters of a folder in which the name of a socket (at most 107) still has room."""
_held: list[TextIO] = []
"""Open for as long as this process lives: the lock of its folder ends with it."""


def keep_temporary_files_together() -> None:
    """From now on, let multiprocessing keep its files in a folder of this process's own; remove those that earlier
    processes of this user have left. Does nothing where no temporary folder can be made, where it would have too long
    a name, and when called again."""
    if _held:
        return
    with contextlib.suppress(OSError):
        base = Path(tempfile.gettempdir())
        remove_abandoned(base)
        _hold_folder_of_torchrun(base)
        if len(str(base)) + len(f".{PREFIX}4194304-12345678") > _LONGEST:
            return
        # Under another name until it is locked, so that no other process takes it for an abandoned one.
        unlocked = Path(tempfile.mkdtemp(prefix=f".{PREFIX}{os.getpid()}-"))
        lock = open(unlocked / LOCK, "w", encoding="utf-8")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder = unlocked.with_name(unlocked.name.removeprefix("."))
        unlocked.rename(folder)
        _held.append(lock)
        _settings()["tempdir"] = str(folder)
        # As multiprocessing does with its own: after its managers have ended, which are spoken to through the folder.
        Finalize(None, remove_temporary_files, exitpriority=-100)


def _hold_folder_of_torchrun(base: Path) -> None:
    """Lock the folder that torchrun made for what its ranks say, together with the other ranks: torchrun leaves it
    there even at a regular end."""
    for folder in Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parents:
        if folder.name.startswith(_TORCHRUN) and folder.parent == base:
            lock = open(folder / LOCK, "a", encoding="utf-8")
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            _held.append(lock)


def remove_temporary_files() -> None:
    """Remove this process's folder, for an end that skips Python's own."""
    folder = _settings().get("tempdir")
    # A child that was forked has the folder of its parent.
    if folder and Path(folder).name.startswith(f"{PREFIX}{os.getpid()}-"):
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(base: Path) -> None:
    """Remove the folders below `base` of processes of this user that are gone: those with our lock that nobody
    holds."""
    for entry in os.scandir(base):
        if not _OURS.fullmatch(entry.name) and not entry.name.startswith(_TORCHRUN):
            continue
        with contextlib.suppress(OSError):  # another process was faster, or it is another user's
            if entry.stat(follow_symlinks=False).st_uid != os.getuid():
                continue
            with open(Path(entry.path) / LOCK, encoding="utf-8") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(entry.path)


def leave_wandb_out() -> None:
    """Let libraries find no wandb to import, until `let_wandb_in`."""
    sys.modules.setdefault("wandb", None)  # type: ignore[arg-type]


def let_wandb_in() -> None:
    """Take back `leave_wandb_out`."""
    if sys.modules.get("wandb", sys) is None:
        del sys.modules["wandb"]


def _settings() -> dict[str, object]:
    return multiprocessing.process.current_process()._config  # type: ignore[attr-defined]
