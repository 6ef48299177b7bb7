"""A temporary folder of this process, which the next one removes if this one is killed.

Libraries put sockets and scratch files into the system's temporary folder (multiprocessing's managers, which
megatron-core's checkpoint writer starts for each save, trackers) and remove them at their end: a kill leaves them for
ever. Here they lie under a name that tells whose they are.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX = "moba_megatron"
# A socket's path has 107 bytes at most, and multiprocessing adds 32 to the folder's.
_LONGEST = 70
_own: tuple[int, Path] | None = None


def use_own_temporary_folder() -> Path:
    """From now on, let this process and those that it starts use a folder of its own for temporary files. Removes those
    that ended processes of this user and machine have left. The folder goes with `remove_own_temporary_folder`."""
    global _own
    if _own is not None and _own[0] == os.getpid() and _own[1].is_dir():
        return _own[1]
    # What a parent that forked this process has chosen is the parent's.
    parent = Path(_own[1].parent if _own is not None else tempfile.gettempdir())
    _remove_left(parent)
    folder = parent / f"{_family()}.{os.getpid()}.{_started(os.getpid())}"
    if len(os.fsencode(folder)) > _LONGEST:
        return parent
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError:  # a full disk, or one that may not be written to: then as before
        return parent
    _own = (os.getpid(), folder)
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    atexit.register(remove_own_temporary_folder)
    return folder


def remove_own_temporary_folder() -> None:
    """Remove this process's folder, if it has one."""
    if _own is not None and _own[0] == os.getpid():
        shutil.rmtree(_own[1], ignore_errors=True)


def _remove_left(parent: Path) -> None:
    for path in parent.glob(f"{_family()}.*"):
        number, started = path.name.split(".")[-2:]
        if number.isdecimal() and _started(int(number)) != started:
            shutil.rmtree(path, ignore_errors=True)


def _family() -> str:
    """What the names of those folders begin with whose processes this one can see: those of this user, in this
    container."""
    namespace = 0
    with contextlib.suppress(OSError):
        namespace = os.stat("/proc/self/ns/pid").st_ino
    return f"{_PREFIX}.{os.getuid()}.{namespace}"


def _started(pid: int) -> str:
    """When a process of this machine began, in ticks since it was started; 0 where there is no such process."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        # The second field, its name in brackets, may hold anything.
        return text[text.rfind(")") :].split()[20]
    return "0"
