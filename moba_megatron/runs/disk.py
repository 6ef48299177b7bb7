"""What a full or forbidden disk means, in one line: which file, how much was needed, how much is there."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

# No space, over a quota, over the largest size of a file, read-only, not allowed, the disk itself.
_DISK = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "over the quota",
    errno.EFBIG: "over the largest size of a file that is allowed",
    errno.EROFS: "read-only file system",
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
    errno.EIO: "the disk reports an error",
}


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
        if isinstance(seen, OSError) and seen.errno in _DISK:
            path = Path(seen.filename) if isinstance(seen.filename, str) else folder
            needed = getattr(seen, "needed", None)
            wants = "" if needed is None else f" needs {size_text(needed)};"
            return f"{path}:{wants} {_DISK[seen.errno]}; {free_text(path)}"
        seen = seen.__cause__ or seen.__context__
    return None


def free_text(path: Path) -> str:
    """How much the disk of a file or folder has left, in words."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return f"its disk has {size_text(shutil.disk_usage(path).free)} left"
    except OSError:
        return "its disk cannot be asked how much is left"


def name_file(error: OSError, path: Path, needed: int) -> None:
    """Tell an error of an open file, which knows no name, the file's and how many bytes were to be written."""
    if error.filename is None:
        error.filename = str(path)
    error.needed = needed  # type: ignore[attr-defined]
