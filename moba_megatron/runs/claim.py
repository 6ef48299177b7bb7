"""One process trains in a run folder, and all its ranks see the same one."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from moba_megatron.config import ConfigError
from moba_megatron.runs.files import Held, hold
from moba_megatron.runs.folder import RunFolder


class RunFolderInUse(ConfigError):
    """Another process trains in the run folder."""


@contextmanager
def claimed(path: str | Path) -> Iterator[str]:
    """Make a run folder this process's own meanwhile, see `hold`.

    Raises:
        RunFolderInUse: another process has claimed it.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    try:
        with hold(RunFolder(path).lock) as claim:
            yield claim
    except Held as held:
        raise RunFolderInUse([
            f"run.dir = {path} is being trained by {held.holder}: wait for it, stop it, or give run.dir another name"
        ]) from held  # fmt: skip


def check_shared(path: str | Path, claim: str | None, patience: float = 60.0) -> None:
    """Raise on all ranks if some of them do not see the run folder that rank 0 has claimed. Collective.

    Args:
        claim: on rank 0, what `claimed` yields.
        patience: seconds for which a network disk may lag.

    Raises:
        ConfigError: naming the machines.
    """
    lock, deadline = RunFolder(path).lock, time.monotonic() + patience
    words = [claim]
    torch.distributed.broadcast_object_list(words, src=0)

    def seen() -> bool:
        # Rank 0 would give up its claim by reading it.
        return claim is not None or (lock.is_file() and lock.read_text(encoding="utf-8").strip() == words[0])

    while not seen() and time.monotonic() < deadline:
        time.sleep(1)
    blind: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(blind, "" if seen() else socket.gethostname())
    machines = ", ".join(sorted(set(blind) - {""}))
    if machines:
        raise ConfigError([
            f"run.dir = {path} (claimed by {words[0]}) is not seen on {machines}: give run.dir a folder on a "
            "disk that all machines share"
        ])  # fmt: skip
