"""Attention of other packages behind the operator's own signatures: FlashMoBA and flash-attn.

Neither is needed, imported or looked for before somebody asks for it. Each has a function that says why it cannot run
on a device (None if it can) and one that translates a call; what a call may not ask of the package raises with the
values, and nothing falls back to another backend.

FlashMoBA (arXiv 2511.11571; package `flash_moba` 2.0.0) chooses blocks by itself. As its sources say: `moba_topk`
counts the query's own block, as `top_k` does here; block means are kept in the inputs' dtype, so that near-ties fall
otherwise than in fp32; and equal scores go to the *higher* block, here to the lower. No GPU has confirmed this adapter;
the benchmark holds it against the definition before it times it.

Legend: T tokens, N query heads, G kv heads, D head size.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from moba_megatron.ops.selection import MOBA, Selection

HALF = (torch.bfloat16, torch.float16)
# What FlashMoBA's sources check or are written for.
FLASH_MOBA_BLOCK_STEP, FLASH_MOBA_TOP_K, FLASH_MOBA_HEAD_SIZE = 64, 64, 256


@functools.cache
def _import_problem(module: str, function: str, how_to_get: str) -> str | None:
    """Why a function of a package cannot be had. A folder of the package's name may be there without it: flash-attn-4
    alone leaves an empty `flash_attn`."""
    if importlib.util.find_spec(module) is None:
        return f"the package {module} is not installed ({how_to_get})"
    try:
        found = importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # a compiled module that does not fit this machine
        return f"{module} does not import: {type(error).__name__}: {error}"
    return None if hasattr(found, function) else f"{module} is there without {function} ({how_to_get})"


def _ampere_problem(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"it needs compute capability 8.0 or newer, this GPU has {major}.{minor}"


def flash_moba_unavailable(device: torch.device) -> str | None:
    """Why FlashMoBA cannot run on a device, None if it can."""
    how = "build github.com/mit-han-lab/flash-moba with CUDA 12.9 or newer and PyTorch 2.8 or newer"
    return _ampere_problem(device) or _import_problem("flash_moba", "flash_moba_varlen_func", how)


def flash_attn_unavailable(device: torch.device) -> str | None:
    """Why flash-attn cannot run on a device, None if it can."""
    how = "pip install --no-build-isolation flash-attn on a machine with CUDA"
    return _ampere_problem(device) or _import_problem("flash_attn", "flash_attn_varlen_func", how)


def _package(name: str) -> ModuleType:
    return importlib.import_module(name)


def _boundaries(q: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> tuple[Tensor, int]:
    """int32 boundaries on q's device, and a bound on the longest document that is known without reading them."""
    if cu_seqlens is None:
        return torch.arange(2, dtype=torch.int32, device=q.device) * q.shape[0], q.shape[0]
    longest = q.shape[0] if max_seqlen is None else min(max_seqlen, q.shape[0])
    return cu_seqlens.to(torch.int32).contiguous(), longest


def flash_moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    *,
    block_size: int,
    top_k: int,
    softmax_scale: float | None,
    max_seqlen: int | None,
    selection: Selection = MOBA,
) -> Tensor:
    """MoBA by FlashMoBA, selection included; arguments as for `moba_attention`.

    Raises:
        ValueError: a selection, dtype, block size, top_k, head size or softmax scale that FlashMoBA does not take.
    """
    size = q.shape[2]
    limits = [
        (selection.is_plain, f"selection by {selection}: only top_k of mean"),
        (q.dtype in HALF, f"dtype {q.dtype}: bf16 or fp16"),
        (
            block_size % FLASH_MOBA_BLOCK_STEP == 0,
            f"block_size {block_size}: a multiple of {FLASH_MOBA_BLOCK_STEP}",
        ),
        (top_k <= FLASH_MOBA_TOP_K, f"top_k {top_k}: at most {FLASH_MOBA_TOP_K}"),
        (size <= FLASH_MOBA_HEAD_SIZE and size % 8 == 0, f"head size {size}: a multiple of 8 up to 256"),
        (softmax_scale is None, f"softmax_scale {softmax_scale}: only the default, 1/sqrt(head size)"),
    ]
    problems = [text for holds, text in limits if not holds]
    if problems:
        raise ValueError(f"backend 'flash_moba' cannot do this: {'; '.join(problems)}; use another backend")
    bounds, longest = _boundaries(q, cu_seqlens, max_seqlen)
    return _package("flash_moba").flash_moba_varlen_func(
        q, k, v, bounds, bounds, longest, longest, moba_chunk_size=block_size, moba_topk=top_k, causal=True
    )


def flash_attn_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, *, softmax_scale: float, max_seqlen: int | None
) -> Tensor:
    """Full causal attention by flash-attn's variable-length kernel; arguments as for `full_attention`.

    Raises:
        ValueError: a head size that flash-attn does not take.
    """
    if q.shape[2] > 256:
        raise ValueError(f"full attention by 'flash_attn' takes head sizes up to 256, not {q.shape[2]}; use 'torch'")
    bounds, longest = _boundaries(q, cu_seqlens, max_seqlen)
    return _package("flash_attn").flash_attn_varlen_func(
        q, k, v, bounds, bounds, longest, longest, softmax_scale=softmax_scale, causal=True
    )
