"""The backends of MoBA and of full attention: their names, whether they can run here, and what `auto` means.

A backend that is asked for by name and cannot run raises; only `auto` chooses, and it says why.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moba_megatron.ops.adapters import HALF, flash_attn_unavailable, flash_moba_unavailable


@dataclass(frozen=True)
class Backend:
    """A way to compute MoBA or full attention.

    Attributes:
        name: what users write.
        summary: one line for `doctor` and docs.
        unavailable: the reason why it cannot run on a device, None if it can.
        dtypes: what it takes; None: every floating dtype.
    """

    name: str
    summary: str
    unavailable: Callable[[torch.device], str | None]
    dtypes: tuple[torch.dtype, ...] | None = None

    def problem(self, device: torch.device, dtype: torch.dtype | None) -> str | None:
        """Why it cannot run on this device, or with this dtype if one is given; None if it can."""
        if dtype is not None and self.dtypes is not None and dtype not in self.dtypes:
            return f"it takes {' and '.join(map(str, self.dtypes))}, not {dtype}"
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
        Backend("triton", "GPU kernels, sparse in time and memory, CUDA devices", _triton_unavailable),
        Backend("flash_moba", "FlashMoBA, another package, never chosen by auto", flash_moba_unavailable, dtypes=HALF),
    )
}

FULL_BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("torch", "PyTorch's choice among its fused kernels of linear memory, any device", _never),
        Backend("torch_flash", "PyTorch's flash kernel", _needs_cuda, dtypes=HALF),
        Backend("cudnn", "cuDNN through PyTorch, one document at a time", _needs_cuda, dtypes=HALF),
        Backend("flash_attn", "the package flash-attn, whole packs at once", flash_attn_unavailable, dtypes=HALF),
    )
}


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
    if name == "auto":
        if device.type == "cuda" and BACKENDS["triton"].unavailable(device) is None:
            return "triton", "auto: the GPU kernels"
        return "gathered", f"auto: the sparse backend that runs on {device.type}"
    return _by_name(BACKENDS, name, device, dtype, "backend")


def resolve_full_backend(name: str, device: torch.device | str, dtype: torch.dtype | None = None) -> tuple[str, str]:
    """Decide what computes full attention; as `resolve_backend`.

    >>> resolve_full_backend("auto", "cpu")
    ('torch', "auto: PyTorch's fused kernels; flash_attn is not available: it needs a CUDA device, not cpu")
    """
    device = torch.device(device)
    if name != "auto":
        return _by_name(FULL_BACKENDS, name, device, dtype, "full-attention backend")
    reason = FULL_BACKENDS["flash_attn"].problem(device, dtype)
    if reason is None:
        return "flash_attn", "auto: flash-attn is installed and attends whole packs at once"
    return "torch", f"auto: PyTorch's fused kernels; flash_attn is not available: {reason}"


def _by_name(
    table: dict[str, Backend], name: str, device: torch.device, dtype: torch.dtype | None, what: str
) -> tuple[str, str]:
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; choose one of {', '.join(['auto', *table])}")
    reason = table[name].problem(device, dtype)
    if reason is not None:
        raise ValueError(f"{what} {name!r} is not available: {reason}")
    return name, "asked for by name"
