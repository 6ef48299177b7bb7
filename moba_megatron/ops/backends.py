"""The backends of MoBA and of full attention: their names, whether they can run here, and what `auto` means.

A backend that is asked for by name and cannot run raises; only `auto` chooses, and it says why.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moba_megatron.ops.adapters import FLASH_ATTENTION, HALF, flash_moba_unavailable


@dataclass(frozen=True)
class Backend:
    """A way to compute MoBA or full attention.

    Attributes:
        name: what users write.
        summary: one line for `doctor` and docs.
        unavailable: the reason why it cannot run on a device, None if it can.
        dtypes: what it takes; None: every floating dtype.
        refuses: the reason why it does not take heads of a size, None if it does; None: it takes every size.
    """

    name: str
    summary: str
    unavailable: Callable[[torch.device], str | None]
    dtypes: tuple[torch.dtype, ...] | None = None
    refuses: Callable[[int], str | None] | None = None

    def problem(
        self, device: torch.device, dtype: torch.dtype | None = None, head_size: int | None = None
    ) -> str | None:
        """Why it cannot run on this device, or with this dtype or head size where they are given; None if it can."""
        if dtype is not None and self.dtypes is not None and dtype not in self.dtypes:
            return f"it takes {' and '.join(map(str, self.dtypes))}, not {dtype}"
        if head_size is not None and self.refuses is not None and (reason := self.refuses(head_size)):
            return reason
        return self.unavailable(device)


# Not looked for within a call: torch.compile of PyTorch before 2.13 cannot see through that.
_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


def _never(device: torch.device) -> str | None:
    return None


def _needs_cuda(device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"it needs a CUDA device, not {device.type}"


def _triton_unavailable(device: torch.device) -> str | None:
    if not _TRITON_IS_INSTALLED:
        return "the package triton is not installed; install it, or use gathered"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return None if major >= 8 else f"its kernels need compute capability 8.0, {device} has {major}.{minor}"
    # Triton's own switch: its interpreter runs kernels on CPU tensors, slowly, for tests.
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"its kernels run on CUDA devices, not on {device.type}; use gathered"


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("reference", "the definition: a dense mask, quadratic in memory, any device", _never),
        Backend("gathered", "portable PyTorch, sparse in time and memory, any device", _never),
        Backend(
            "triton",
            "GPU kernels, sparse in time and memory, CUDA devices",
            _triton_unavailable,
            (*HALF, torch.float32),
        ),
        Backend("flash_moba", "FlashMoBA, another package, never chosen by auto", flash_moba_unavailable, dtypes=HALF),
    )
}

FULL_BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("torch", "PyTorch's choice among its fused kernels of linear memory, any device", _never),
        Backend("torch_flash", "PyTorch's flash kernel", _needs_cuda, dtypes=HALF),
        Backend("cudnn", "cuDNN through PyTorch, one document at a time", _needs_cuda, dtypes=HALF),
        *(
            Backend(
                name,
                f"the package {package}, whole packs at once",
                FLASH_ATTENTION[name].unavailable,
                HALF,
                FLASH_ATTENTION[name].refuses,
            )
            for name, package in (
                ("flash_attn", "flash-attn 2"),
                ("flash_attn_3", "flash-attn 3 (Hopper)"),
                ("flash_attn_4", "flash-attn-4 (Hopper, Blackwell)"),
            )
        ),
    )
}
# The first that can run. On Hopper version 3 has kernels of its own; version 2 has those of Ampere.
_AUTO_FULL = ("flash_attn_3", "flash_attn_4", "flash_attn")


def backend_names() -> list[str]:
    """All names of MoBA backends a user may write, `auto` first."""
    return ["auto", *BACKENDS]


def full_backend_names() -> list[str]:
    """All names of full-attention backends a user may write, `auto` first."""
    return ["auto", *FULL_BACKENDS]


def resolve_backend(name: str, device: torch.device | str, dtype: torch.dtype | None = None) -> tuple[str, str]:
    """Decide which backend computes MoBA.

    Args:
        name: `auto` or a backend's name.
        device: where the tensors live.
        dtype: of the tensors; None where it is not known yet.

    Returns:
        The backend's name, and the reason for the choice in a few words.

    Raises:
        ValueError: an unknown name, or a backend that cannot run on this device or with this dtype.

    >>> resolve_backend("auto", "cpu")
    ('gathered', 'auto: the sparse backend that runs on cpu')
    """
    device = torch.device(device)
    if name != "auto":
        return _by_name(BACKENDS, name, device, dtype, None, "backend")
    if device.type == "cuda":
        problem = BACKENDS["triton"].problem(device, dtype)
        if problem is None:
            return "triton", "auto: the GPU kernels"
        return "gathered", f"auto: the sparse backend for any device; triton cannot run: {problem}"
    return "gathered", f"auto: the sparse backend that runs on {device.type}"


def resolve_full_backend(
    name: str, device: torch.device | str, dtype: torch.dtype | None = None, head_size: int | None = None
) -> tuple[str, str]:
    """Decide what computes full attention; as `resolve_backend`, and by the head size where it is given.

    >>> resolve_full_backend("auto", "cpu")[0]
    'torch'
    """
    device = torch.device(device)
    if name != "auto":
        return _by_name(FULL_BACKENDS, name, device, dtype, head_size, "full-attention backend")
    refused: dict[str, list[str]] = {}
    for candidate in _AUTO_FULL:
        reason = FULL_BACKENDS[candidate].problem(device, dtype, head_size)
        if reason is None:
            return candidate, f"auto: {FULL_BACKENDS[candidate].summary}"
        refused.setdefault(reason, []).append(candidate)
    why = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in refused.items())
    return "torch", f"auto: PyTorch's fused kernels; not available: {why}"


def _by_name(
    table: dict[str, Backend],
    name: str,
    device: torch.device,
    dtype: torch.dtype | None,
    head_size: int | None,
    what: str,
) -> tuple[str, str]:
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; choose one of {', '.join(['auto', *table])}")
    reason = table[name].problem(device, dtype, head_size)
    if reason is not None:
        raise ValueError(f"{what} {name!r} is not available: {reason}")
    return name, "asked for by name"
