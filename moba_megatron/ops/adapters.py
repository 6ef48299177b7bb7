"""Attention of other packages behind the operator's own signatures: FlashMoBA, and flash-attn in its versions 2, 3, 4.

A package is imported only when a call names it. Each has a function that says why it cannot run on a device (None if it
can) and one that translates a call. A call that the package does not support raises with the values; nothing falls back
to another backend.

The three versions of flash-attn (github.com/Dao-AILab/flash-attention) are packages that stand beside each other:
`flash-attn` (2; `flash_attn`), the folder `hopper` of its sources (3; `flash_attn_interface`) and `flash-attn-4` (4;
`flash_attn.cute`). Their functions have one name and different signatures: the fourth positional argument of version 4
is not `cu_seqlens_q`, and it returns the log-sum-exp as well. So everything behind q, k and v goes by keyword.

FlashMoBA (arXiv 2511.11571; package `flash_moba` 2.0.0) chooses blocks by itself. As its sources say: `moba_topk`
counts the query's own block, as `top_k` does here; block means are kept in the inputs' dtype, so that near-ties fall
otherwise than in fp32; and equal scores go to the *higher* block, here to the lower. No GPU has confirmed this adapter;
the benchmark compares it with the definition before timing it.

Legend: T tokens, N query heads, G kv heads, D head size.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor

from moba_megatron.ops.selection import MOBA, Selection

HALF = (torch.bfloat16, torch.float16)
# What FlashMoBA's sources check or are written for.
FLASH_MOBA_BLOCK_STEP, FLASH_MOBA_TOP_K, FLASH_MOBA_HEAD_SIZE = 64, 64, 256


# Compute capabilities, by their first number.
_AMPERE_OR_NEWER = range(8, 100)


@dataclass(frozen=True)
class FlashAttention:
    """One version of flash-attn, as its sources say.

    Attributes:
        module: where `flash_attn_varlen_func` is.
        how_to_get: for messages.
        majors: the GPUs that it has kernels for, by their compute capability's first number.
        head_sizes, sizes_in_words: what it takes.
        deterministic_up_to: the largest head size with deterministic gradients.
    """

    module: str
    how_to_get: str
    majors: range
    head_sizes: Container[int]
    sizes_in_words: str
    deterministic_up_to: int = 256

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run on a device, None if it can."""
        return _gpu_problem(device, self.majors) or _import_problem(
            self.module, "flash_attn_varlen_func", _FLASH_ATTENTION_WORDS, self.how_to_get
        )

    def refuses(self, head_size: int) -> str | None:
        """Why it does not take heads of this size, None if it does."""
        if head_size not in self.head_sizes:
            return f"it takes head sizes {self.sizes_in_words}, not {head_size}"
        if head_size > self.deterministic_up_to and torch.are_deterministic_algorithms_enabled():
            return f"it has deterministic gradients for head sizes up to {self.deterministic_up_to}, not {head_size}"
        return None


_FLASH_ATTENTION_WORDS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal",
                          "deterministic")  # fmt: skip
_FLASH_MOBA_WORDS = ("moba_chunk_size", "moba_topk", "causal")


FLASH_ATTENTION = {
    "flash_attn": FlashAttention(
        "flash_attn",
        "pip install --no-build-isolation flash-attn on a machine with CUDA",
        _AMPERE_OR_NEWER,
        range(1, 257),
        "up to 256",
    ),
    "flash_attn_3": FlashAttention(
        "flash_attn_interface",
        "install the folder hopper of github.com/Dao-AILab/flash-attention with CUDA 12.3 or newer",
        range(9, 10),
        range(8, 257, 8),
        "that are multiples of 8 up to 256",
        deterministic_up_to=192,
    ),
    "flash_attn_4": FlashAttention(
        "flash_attn.cute",
        "pip install flash-attn-4",
        range(9, 12),
        (*range(8, 129, 8), 256),
        "that are multiples of 8 up to 128, and 256",
    ),
}


@functools.cache
def _import_problem(module: str, function: str, words: tuple[str, ...], how_to_get: str) -> str | None:
    """Why a function of a package, called with these words, cannot be had.

    A folder of the package's name may be there without it: flash-attn-4 alone leaves an empty `flash_attn`. Another
    version may be there: flash-attn 2.8.3 brings an early version 4 along, whose function has no `max_seqlen_q`.
    """
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            return f"{module} does not import: {type(error).__name__}: {error}"
        return f"the package {module} is not installed ({how_to_get})"
    except Exception as error:  # a compiled module, or a compiler, that does not fit this machine raises anything
        return f"{module} does not import: {type(error).__name__}: {error}"
    if not hasattr(found, function):
        return f"{module} is there without {function} ({how_to_get})"
    try:
        parameters = inspect.signature(getattr(found, function)).parameters
    except (TypeError, ValueError):  # compiled: it will say itself what it does not take
        return None
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    lacking = [word for word in words if word not in parameters and not takes_any]
    return f"{module} is of another version: it takes no {', '.join(lacking)} ({how_to_get})" if lacking else None


def _gpu_problem(device: torch.device, majors: range) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major in majors:
        return None
    wanted = f"{majors[0]}.0 or newer" if majors == _AMPERE_OR_NEWER else " or ".join(f"{one}.x" for one in majors)
    return f"it needs compute capability {wanted}, this GPU has {major}.{minor}"


def flash_moba_unavailable(device: torch.device) -> str | None:
    """Why FlashMoBA cannot run on a device, None if it can."""
    how = "build github.com/mit-han-lab/flash-moba with CUDA 12.9 or newer and PyTorch 2.8 or newer"
    return _gpu_problem(device, _AMPERE_OR_NEWER) or _import_problem(
        "flash_moba", "flash_moba_varlen_func", _FLASH_MOBA_WORDS, how
    )


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
        ValueError: a selection, block size, top_k, head size or softmax scale that FlashMoBA does not take.
    """
    size = q.shape[2]
    limits = [
        (selection.is_plain, f"selection by {selection}: only top_k of mean"),
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
    return importlib.import_module("flash_moba").flash_moba_varlen_func(
        q, k, v, bounds, bounds, longest, longest, moba_chunk_size=block_size, moba_topk=top_k, causal=True
    )


def flash_attn_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    *,
    softmax_scale: float,
    max_seqlen: int | None,
    version: str,
) -> Tensor:
    """Full causal attention by a version of flash-attn, for packs; arguments as for `full_attention`.

    The gradient of q is summed in an order left open, unless PyTorch is asked for deterministic algorithms.

    Args:
        version: `flash_attn`, `flash_attn_3` or `flash_attn_4`, of which `resolve_full_backend` says what they take.
    """
    bounds, longest = _boundaries(q, cu_seqlens, max_seqlen)
    found = importlib.import_module(FLASH_ATTENTION[version].module).flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=softmax_scale,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    # Version 4, and early builds of 3, return the log-sum-exp as well.
    return found[0] if isinstance(found, tuple) else found
