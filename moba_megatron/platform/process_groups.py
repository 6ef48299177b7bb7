"""Start and stop of the process groups, and the random number streams that follow from them.

Under torchrun the rendezvous comes from its environment; without it a process is a world of one; tests name a file. The
order of ranks is megatron-core's: tensor parallel fastest, then context, data, and pipeline slowest.
"""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist

from moba_megatron.config import ParallelConfig
from moba_megatron.platform.device import current_device

_timeout = datetime.timedelta(minutes=30)


def start_process_group(
    *,
    init_method: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    timeout_seconds: float = 1800.0,
    alone: bool = False,
) -> torch.device:
    """Join the default process group: nccl on GPU, gloo on CPU. Returns the device of this process.

    Args:
        init_method: rendezvous, for instance `file:///path` (a file that does not exist yet). Default: torchrun's
            environment if `RANK` is set, otherwise a world of one process.
        rank, world_size: needed with `init_method`.
        timeout_seconds: after this long without progress a collective fails, also one of the groups that
            `start_model_parallel` makes, and the making of them.
        alone: a world of one process, whatever the environment says.

    Raises:
        ValueError: if `init_method` comes without rank and world size.
    """
    device = current_device()
    backend = "nccl" if device.type == "cuda" else "gloo"
    global _timeout
    _timeout = datetime.timedelta(seconds=timeout_seconds)
    settings: dict = {"timeout": _timeout}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # NCCL connects all ranks now, with this GPU, and not at the first collective with one that it guesses.
        settings["device_id"] = device
    if init_method is not None:
        if rank is None or world_size is None:
            raise ValueError(f"init_method {init_method!r} needs rank and world_size, not {rank} and {world_size}")
        dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=world_size, **settings)
    elif "RANK" in os.environ and not alone:
        dist.init_process_group(backend, **settings)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, **settings)
    if device.type == "cuda":
        # Bound to a device, PyTorch would split this group for every group that is made later, with all ranks:
        # thousands of collectives at the start of a large run, most of them for groups in which a rank has no part.
        dist.group.WORLD.bound_device_id = None
    return device


def start_model_parallel(parallel: ParallelConfig, context_levels: tuple[int, int] | None = None) -> None:
    """Split the default process group into megatron-core's tensor, pipeline, context and data parallel groups.

    Args:
        context_levels: ranks of the a2a level and of the p2p level within a context-parallel group, for `a2a+p2p`; the
            a2a level joins ranks that are neighbours in the group. Default: `parallel.hierarchical_context`.
    """
    from megatron.core import parallel_state

    levels = context_levels or parallel.hierarchical_context
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor,
        hierarchical_context_parallel_sizes=list(levels) if levels else None,
        # Its own default would hold for all groups but the first. A fraction of a minute serves as well.
        distributed_timeout_minutes=_timeout.total_seconds() / 60,  # type: ignore[arg-type]
    )


def stop_process_groups() -> None:
    """Leave all process groups; does nothing where none was started."""
    from megatron.core import parallel_state

    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_all(seed: int) -> None:
    """Seed Python, NumPy, PyTorch and megatron-core's parallel streams. Needs the model-parallel groups.

    Streams differ between pipeline stages and, for what is sharded, between tensor-parallel ranks; they are the same on
    data-parallel ranks.
    """
    import random

    import numpy
    from megatron.core import parallel_state, tensor_parallel

    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
