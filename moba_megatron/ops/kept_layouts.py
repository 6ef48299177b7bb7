"""The layout of a pack on an accelerator, made once for all layers of a microbatch.

Layers of a microbatch get the same tensor of boundaries, and so do the backward pass and recomputation. A layout is
remembered for a tensor that `stays_as_it_is` was told of, or for the sizes where there is one document. Other tensors
may change unseen: a collective that writes into one leaves no trace on it. What backends make of a layout is kept with
it. On the host nothing is remembered: what is made there is not launched.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from moba_megatron.ops.layout import BlockLayout, block_layout

Made = TypeVar("Made")


@dataclass(frozen=True)
class _Kept:
    key: Hashable
    boundaries: weakref.ref[Tensor] | None
    version: int
    made: BlockLayout | Tensor


_MOST_KEPT = 8
_MOST_CONSTANT = 64
_constant: list[weakref.ref[Tensor]] = []


def stays_as_it_is(boundaries: Tensor) -> None:
    """Say that nobody writes into a tensor of boundaries from now on, so that its layout may be kept."""
    _constant[:] = [known for known in _constant if known() is not None][1 - _MOST_CONSTANT :]
    _constant.append(weakref.ref(boundaries))


def _is_constant(boundaries: Tensor) -> bool:
    return any(known() is boundaries for known in _constant)


_kept: list[_Kept] = []


def layout_of(tensor: Tensor, cu_seqlens: Tensor | None, block_size: int, max_seqlen: int | None) -> BlockLayout:
    """`block_layout` of the pack whose tokens are the rows of a tensor, on its device."""
    tokens, device = tensor.shape[0], tensor.device

    def make() -> BlockLayout:
        return block_layout(tokens, block_size, cu_seqlens, max_seqlen=max_seqlen, device=device)

    told = cu_seqlens is None or (_can_be_kept(cu_seqlens) and _is_constant(cu_seqlens))
    if not told or not _can_be_kept(tensor):
        return make()
    return _remembered(("layout", tokens, block_size, max_seqlen, *_place(device)), cu_seqlens, make)


def equal_boundaries(documents: int, length: int, device: torch.device) -> Tensor:
    """int32 [documents + 1], boundaries of documents of one length: one tensor for all layers.

    >>> equal_boundaries(2, 5, torch.device("cpu")).tolist()
    [0, 5, 10]
    """

    def make() -> Tensor:
        return torch.arange(0, (documents + 1) * length, length, dtype=torch.int32, device=device)

    if not _outlives_the_call(device):
        return make()
    made = _remembered(("boundaries", documents, length, *_place(device)), None, make)
    if not _is_constant(made):
        stays_as_it_is(made)
    return made


def _can_be_kept(tensor: Tensor) -> bool:
    """Whether what is made for a tensor may be kept: not what is only traced, nor what may change unseen."""
    known = type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_inference()
    return known and _outlives_the_call(tensor.device)


def _outlives_the_call(device: torch.device) -> bool:
    """Whether tensors that are made on a device now are valid later: a CUDA graph owns what it captures."""
    if device.type == "cpu" or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _place(device: torch.device) -> tuple[torch.device, int]:
    """The device and its current stream: what one stream makes may not be ready on another."""
    return device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _remembered(key: Hashable, boundaries: Tensor | None, make: Callable[[], Made]) -> Made:
    version = 0 if boundaries is None else boundaries._version
    for kept in _kept:
        same = kept.boundaries is None if boundaries is None else kept.boundaries and kept.boundaries() is boundaries
        if same and (kept.key, kept.version) == (key, version):
            return kept.made  # type: ignore[return-value]
    made = make()
    if isinstance(made, Tensor) and type(made) is not Tensor:
        return made  # only traced
    alive = [kept for kept in _kept if kept.boundaries is None or kept.boundaries() is not None]
    reference = None if boundaries is None else weakref.ref(boundaries)
    _kept[:] = [*alive, _Kept(key, reference, version, made)][-_MOST_KEPT:]  # type: ignore[arg-type]
    return made
