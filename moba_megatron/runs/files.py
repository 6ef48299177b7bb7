"""Files that stay valid after a kill and while other processes read them: complete or absent, one writer at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moba_megatron.runs.disk import name_file

_LONGEST_LINE = 2**14


def write_whole(path: Path, text: str) -> None:
    """Replace a file so that a reader sees the old text or the new one."""
    # Several processes may write at once, such as all ranks when all of them fail.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(unfinished, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            # On some disks a rename survives a power failure that the text does not.
            os.fsync(stream.fileno())
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        name_file(error, path, len(text))
        raise
    os.replace(unfinished, path)


def write_in_place(path: Path, text: str) -> None:
    """Replace the text of a file within the room that it has: for a full disk, where `write_whole` finds none. A reader
    may see a part of it."""
    with open(path, "r+", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        stream.truncate()


def read_json(path: Path, needs: tuple[str, ...] = ()) -> dict[str, Any] | None:
    """The object of a JSON file; None if there is no file.

    Args:
        needs: keys that it has.

    Raises:
        ValueError: it holds something else.
    """
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}; copy it again, or move it away") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no object; copy it again, or move it away")
    if missing := [key for key in needs if key not in found]:
        raise ValueError(f"{path} is damaged: it has no {missing[0]}; copy it again, or move it away")
    return found


def read_json_lines(path: Path, needs: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The complete lines of a file, oldest first; empty if there is no file.

    Args:
        needs: keys that every line has.

    Raises:
        ValueError: a line that is not a JSON object, by its number.
    """
    found = []
    for number, line in enumerate(_complete_lines(path), start=1):
        try:
            values = _line_values(line, needs)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number} is damaged: {error}; remove that line, or continue the run, which removes it"
            ) from error
        found.append(values)
    return found


def readable_json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """As `read_json_lines`, without the damaged lines and those without a step, and how many these are."""
    lines, damaged = [], 0
    for line in _complete_lines(path):
        try:
            lines.append(_line_values(line, ("step",)))
        except ValueError:
            damaged += 1
    return lines, damaged


def last_json_line(path: Path, needs: tuple[str, ...] = ()) -> dict[str, Any] | None:
    """The last complete line of a file, of which only the end is read; None if there is none, or if it is damaged.

    Args:
        needs: keys that it has.
    """
    lines = _complete_lines(path, _LONGEST_LINE)
    try:
        return _line_values(lines[-1], needs) if lines else None
    except ValueError:
        return None


def _line_values(line: bytes, needs: tuple[str, ...]) -> dict[str, Any]:
    """Raises ValueError for a line that is not a JSON object, or has not all keys that it needs."""
    try:
        values = json.loads(line)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError("it holds no object")
    if missing := [key for key in needs if key not in values]:
        raise ValueError(f"it has no {missing[0]}")
    return values


def _complete_lines(path: Path, within: int | None = None) -> list[bytes]:
    """All lines but one that a kill cut short.

    Args:
        within: read only so many bytes at the end of the file; the first line may lack its beginning.
    """
    if not path.is_file():
        return []
    with path.open("rb") as stream:
        if within is not None:
            stream.seek(max(0, stream.seek(0, 2) - within))
        data = stream.read()
    return data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]


def append_json_line(path: Path, values: dict[str, Any]) -> None:
    """Add a line to a file, made if missing. What a killed writer left of its last line goes first."""
    with path.open("ab+") as stream:
        end = stream.seek(0, 2)
        stream.seek(0)
        complete = stream.read().rfind(b"\n") + 1
        if complete < end:
            stream.truncate(complete)
        stream.write((json.dumps(values, default=str) + "\n").encode())


class Held(Exception):
    """Another process holds a lock; `holder` says which."""

    def __init__(self, holder: str):
        self.holder = holder
        super().__init__(holder)


@contextmanager
def hold(path: Path) -> Iterator[str]:
    """Hold the lock of a file, made if missing. The file then names this process; the name is yielded. The lock ends
    with the process, however that ends; children do not inherit it. It also ends if this process opens the file once
    more and closes it. On a file system without locks everybody passes.

    Raises:
        Held: another process has it.
    """
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Any other error: a file system without locks.
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise Held(file.read().strip() or "another process") from error
        claim = f"process {os.getpid()} on {socket.gethostname()}"
        file.truncate(0)
        file.write(claim + "\n")
        file.flush()
        # So that other machines see it.
        os.fsync(file.fileno())
        yield claim
