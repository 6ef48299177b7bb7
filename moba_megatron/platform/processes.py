"""Processes that end together: children with their parent, and a rank at once."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import NoReturn


def die_with_parent() -> None:
    """On Linux, end this process when its parent ends, however that ends: a killed launcher leaves no orphan ranks
    behind, and a killed rank no helper processes."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def leave(code: int) -> NoReturn:
    """End the process after flushing: gloo's own destruction aborts once in a while after a clean end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
