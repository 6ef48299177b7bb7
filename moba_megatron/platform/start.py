"""The start of a rank, in the one order that works: threads, differences, process groups, seeds."""

from __future__ import annotations

import os

import torch

from moba_megatron.config import ParallelConfig
from moba_megatron.platform.command_ranks import command_ranks
from moba_megatron.platform.device import current_device
from moba_megatron.platform.differences import apply
from moba_megatron.platform.launched import check_launch
from moba_megatron.platform.process_groups import seed_all, start_model_parallel, start_process_group
from moba_megatron.temporary import keep_temporary_files_together


def start_rank(
    parallel: ParallelConfig, *, seed: int, threads: int | None = None, context_levels: tuple[int, int] | None = None
) -> torch.device:
    """Make this process a rank and return its device. A process group that the caller has started is used.

    Args:
        threads: CPU threads of this process. Default: the cores it may use, divided by the processes on this machine.
        context_levels: as for `start_model_parallel`.
    """
    local_ranks = check_launch(alone=True).local_ranks
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local_ranks))
    device = current_device()
    apply(device.type)
    if not torch.distributed.is_initialized():
        start_process_group()
    start_model_parallel(parallel, context_levels)
    seed_all(seed)
    return device


def start_single_rank(seed: int) -> torch.device:
    """Make this process a world of its own and return its device: for commands that are one process, also in a shell
    beside a job, which has a launcher's variables around.

    Raises:
        ValueError: torchrun started several, or a launcher's variable is not a number.
    """
    keep_temporary_files_together()
    launch = check_launch(alone=True)
    if "TORCHELASTIC_RUN_ID" in os.environ and launch.world_size > 1:
        raise ValueError(
            f"this command needs one process, but torchrun started {launch.world_size}: run it without torchrun"
        )
    if not torch.distributed.is_initialized():
        start_process_group(alone=True)
    return start_rank(ParallelConfig(), seed=seed)


def start_command(
    parallel: ParallelConfig, *, seed: int, context_levels: tuple[int, int] | None = None
) -> torch.device:
    """Make this process a rank of a command that several processes may share, and return its device. Alone it is a
    world of its own, as by `start_single_rank`.

    Args:
        parallel: the layout, which fits `command_ranks()`.
        context_levels: as for `start_model_parallel`.
    """
    if command_ranks() == 1:
        return start_single_rank(seed)
    keep_temporary_files_together()
    return start_rank(parallel, seed=seed, context_levels=context_levels)
