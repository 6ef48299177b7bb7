"""The device of this process."""

from __future__ import annotations

import torch

from moba_megatron.platform.launched import check_launch


def current_device() -> torch.device:
    """The GPU of this process if the machine has one (`LOCAL_RANK` as torchrun sets it, else 0), otherwise the CPU.

    Raises:
        ValueError: if there are fewer GPUs than processes on this machine.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = check_launch(alone=True).local_rank
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK = {local_rank}, but this machine has {torch.cuda.device_count()} GPUs: start one process for "
            "each GPU, or hide all GPUs with CUDA_VISIBLE_DEVICES='' to run on the CPU"
        )
    return torch.device("cuda", local_rank)
