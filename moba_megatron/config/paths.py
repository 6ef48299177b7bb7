"""The message about paths that do not exist."""

from __future__ import annotations

import os
from pathlib import Path


def counted_from(path: str | Path) -> str:
    """The end of a message about a path: the folder that it counts from, where it is a relative one."""
    return "" if os.path.isabs(path) else f" (relative paths count from {Path.cwd()})"
