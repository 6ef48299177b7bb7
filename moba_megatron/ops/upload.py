"""Small tensors from the host to a device, without a wait."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device.

    On CUDA it goes through pinned memory: a copy from other memory makes the host wait until the device has done all
    that it was asked for before. A tensor that is on the device already is returned as it is.

    >>> upload(torch.tensor([1, 2]), torch.device("cpu")).tolist()
    [1, 2]
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
