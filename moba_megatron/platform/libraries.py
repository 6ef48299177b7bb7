"""Optional libraries: which are installed, which version, and if not, why and how to get them.

None of them must be installed. A library counts as available only if its compiled part imports, because a package of
the right name may be there without it (for instance apex: the package of that name on the Python index is another
project, so NVIDIA's is known by its compiled modules).
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Library:
    """Facts about one optional library."""

    name: str
    available: bool
    version: str | None
    """Version of the installed distribution; None if unknown or not installed."""
    reason: str
    """Why it is not available; empty if it is."""
    purpose: str
    """Its use here."""
    how_to_get: str


# name -> (modules that must all import, distributions that may carry it, purpose, how to get it). Without modules a
# distribution is enough: importing version 4 of flash-attn starts a compiler, and `ops.adapters` looks before its use.
_KNOWN: dict[str, tuple[tuple[str, ...], tuple[str, ...], str, str]] = {
    "transformer_engine": (
        ("transformer_engine.pytorch",),
        ("transformer-engine", "transformer_engine"),
        "fused layers, fused Adam, fused full attention",
        "pip install --no-build-isolation 'transformer-engine[pytorch]' on a machine with CUDA, "
        "or use a container that has it",
    ),
    "apex": (
        ("amp_C", "fused_weight_gradient_mlp_cuda"),
        (),
        "fused Adam and gradient-accumulation fusion where Transformer Engine is missing",
        "build https://github.com/NVIDIA/apex from source with its CUDA extensions; the package named apex on the "
        "Python index is another project",
    ),
    "flash_attn": (
        ("flash_attn", "flash_attn_2_cuda"),
        ("flash-attn", "flash_attn"),
        "full attention on GPU",
        "pip install --no-build-isolation flash-attn on a machine with CUDA",
    ),
    "flash_attn_3": (
        (),
        ("flash_attn_3", "flash-attn-3"),
        "full attention on Hopper",
        "install the folder hopper of https://github.com/Dao-AILab/flash-attention with CUDA 12.3 or newer",
    ),
    "flash_attn_4": (
        (),
        ("flash-attn-4",),
        "full attention on Hopper and Blackwell",
        "pip install flash-attn-4",
    ),
    "triton": (
        ("triton",),
        ("triton", "pytorch-triton"),
        "the GPU kernels of MoBA",
        "pip install triton (Linux)",
    ),
}


@functools.cache
def optional_libraries() -> dict[str, Library]:
    """All optional libraries by name; found once in a process."""
    return {name: _find(name) for name in _KNOWN}


def _find(name: str) -> Library:
    modules, distributions, purpose, how_to_get = _KNOWN[name]
    reason = next((problem for problem in map(_import_problem, modules) if problem), "")
    versions = (_distribution_version(distribution) for distribution in distributions)
    version = next((version for version in versions if version), None)
    if not modules and version is None:
        reason = f"{' or '.join(distributions)} is not installed"
    return Library(name, not reason, version, reason, purpose, how_to_get)


def _import_problem(module: str) -> str:
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"module {module.partition('.')[0]} is not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # a compiled module that does not fit this machine raises anything
        return f"{module} does not import: {type(error).__name__}: {error}"
    return ""


def _distribution_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
