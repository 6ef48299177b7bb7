"""The operator's backends: their names, whether they can run here, and what `auto` means.

A backend that is asked for by name and cannot run raises; only `auto` chooses, and it says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Backend:
    """A way to compute the operator.

    Attributes:
        name: what users write.
        summary: one line for `doctor` and docs.
        unavailable: the reason why it cannot run on a device, None if it can.
    """

    name: str
    summary: str
    unavailable: Callable[[torch.device], str | None]


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("reference", "the definition: a dense mask, quadratic in memory, any device", lambda device: None),
        Backend("gathered", "portable PyTorch, sparse in time and memory, any device", lambda device: None),
        Backend("triton", "GPU kernels", lambda device: "this version has no Triton kernels yet; use gathered"),
    )
}


def backend_names() -> list[str]:
    """All names a user may write, `auto` first."""
    return ["auto", *BACKENDS]


def resolve_backend(name: str, device: torch.device | str) -> tuple[str, str]:
    """Decide which backend runs.

    Args:
        name: `auto` or a backend's name.
        device: where the tensors live.

    Returns:
        The backend's name, and the reason for the choice in a few words.

    Raises:
        ValueError: an unknown name, or a backend that cannot run on this device.

    >>> resolve_backend("auto", "cpu")
    ('gathered', 'auto: the sparse backend that runs on cpu')
    """
    device = torch.device(device)
    if name == "auto":
        return "gathered", f"auto: the sparse backend that runs on {device.type}"
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(backend_names())}")
    reason = BACKENDS[name].unavailable(device)
    if reason is not None:
        raise ValueError(f"backend {name!r} is not available: {reason}")
    return name, "asked for by name"
