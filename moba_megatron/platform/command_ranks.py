"""A command on several processes: the number of processes that a launcher started, and a common end when one fails, as
in a training."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from moba_megatron.errors import explained
from moba_megatron.platform.launched import check_launch
from moba_megatron.platform.processes import die_with_parent, end_job, leave, watch_for_failure


def command_ranks() -> int:
    """Processes of this command: those of a process group that is there, else as many as torchrun started. Other
    launchers' variables count for nothing: they are also around a shell beside a job.

    Raises:
        ConfigError: torchrun's variables do not fit each other.
    """
    if dist.is_initialized():
        return dist.get_world_size()
    return check_launch(alone=True).world_size if "TORCHELASTIC_RUN_ID" in os.environ else 1


def speaks() -> bool:
    """Whether this process is the one that prints, draws and writes."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    return command_ranks() == 1 or os.environ.get("RANK", "0") == "0"


def one_process(command: str) -> None:
    """Refuse several processes of a command that is one.

    Raises:
        ValueError: naming how many there are.
    """
    if (ranks := command_ranks()) > 1:
        raise ValueError(f"{command} needs one process, but {ranks} were started: run it without torchrun")


@contextmanager
def ranks_end_together() -> Iterator[None]:
    """What torchrun's processes of a command do, from the first check on. One that fails tells the others, which end
    within a second; what a user can fix is told once, and ends with 2. After the last line the process is left at once,
    when all have come as far.

    Nothing of this where there is one process, or where the caller has started the process group.
    """
    if dist.is_initialized() or command_ranks() == 1:
        yield
        return
    die_with_parent()
    if not speaks():
        logging.getLogger("moba_megatron").setLevel("ERROR")
    watch_for_failure()
    try:
        yield
        if dist.is_initialized():
            dist.barrier()
    except BaseException as error:  # whatever ends a rank must not leave the others waiting
        _end(error)
    leave(0)


def _end(error: BaseException) -> None:
    if isinstance(error, KeyboardInterrupt):
        end_job(error, "stopped", code=130)
    known = explained(error)
    end_job(error, None if known is None else f"error: {known}", code=1 if known is None else 2)
