"""Errors of a full or forbidden disk where a run writes: add the file that the system did not name, and the bytes that
were needed (`errors.describe_os_error` makes the message)."""

from __future__ import annotations

import shutil
from pathlib import Path

from moba_megatron.errors import describe_os_error


def size_text(size: float) -> str:
    """A number of bytes for a person.

    >>> size_text(0), size_text(213), size_text(3_400_000)
    ('0 bytes', '213 bytes', '3.4 MB')
    """
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} bytes" if units[0] == "bytes" else f"{size:.1f} {units[0]}"


def disk_error_line(error: BaseException, folder: Path) -> str | None:
    """What a failed write means, in one line; None for an error that is not one of the disk.

    Args:
        error: with those that it came from.
        folder: where the file lies, if the error names none.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            if seen.filename is None:
                seen.filename = str(folder)
            return describe_os_error(seen)
        seen = seen.__cause__
    return None


def free_text(path: Path) -> str:
    """How much the disk of a file or folder has left, in words."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return f"its disk has {size_text(shutil.disk_usage(path).free)} left"
    except OSError:
        return "the free space of its disk is unknown"


def name_file(error: OSError, path: Path, needed: int) -> None:
    """Tell an error of an open file, which knows no name, the file's and how many bytes were to be written."""
    if error.filename is None:
        error.filename = str(path)
    error.needed = needed  # type: ignore[attr-defined]
