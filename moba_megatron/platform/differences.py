"""Assumptions of megatron-core (CUDA, with fused libraries) that do not hold on this machine: every difference, in one
table.

megatron-core reaches for CUDA in a handful of places. Each row of `DIFFERENCES` names one of them, gives the reason,
and has the replacement as (owner, attribute, new value). `apply` puts the rows in place, once, at the start of a
process; `restore` takes them back (for tests). `torch.cuda.is_available()` stays as it is, so code that asks is not
misled. Modules that took a reference before `apply` keep the original; megatron-core looks all of these up when it
needs them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.managers import SyncManager
from typing import Any, Literal

import torch

from moba_megatron.platform.adam import Adam
from moba_megatron.platform.libraries import optional_libraries
from moba_megatron.platform.processes import die_with_parent

Replacement = tuple[Any, str, Any]
DeviceType = Literal["cpu", "cuda"]


_MISSING = object()
"""What was there before where nothing was."""


@dataclass(frozen=True)
class Difference:
    """One row: `name`, `reason` (what happens without it), and `replacements`, which imports only when it is called."""

    name: str
    reason: str
    replacements: Callable[[], list[Replacement]]
    needed: Callable[[DeviceType], bool] = lambda device_type: device_type == "cpu"

    def apply(self) -> list[Replacement]:
        """Put the replacements in place; return what was there before, in the same form."""
        new = self.replacements()
        before = [(owner, attribute, getattr(owner, attribute, _MISSING)) for owner, attribute, _ in new]
        for owner, attribute, value in new:
            _set(owner, attribute, value)
        return before


def _current_device() -> list[Replacement]:
    return [(torch.cuda, "current_device", lambda: torch.device("cpu"))]


def _synchronize() -> list[Replacement]:
    return [(torch.cuda, "synchronize", lambda device=None: None)]


class _OneStream:
    """Stands for the one order of work that a CPU has: whatever is waited for has been done."""

    def wait_stream(self, stream) -> None: ...

    def wait_event(self, event) -> None: ...

    def record_event(self, event=None) -> _OneStream:
        return self

    def synchronize(self) -> None: ...


_STREAM = _OneStream()


def _current_stream() -> list[Replacement]:
    return [(torch.cuda, "current_stream", lambda device=None: _STREAM)]


def _product_of_routers() -> list[Replacement]:
    from megatron.core.transformer.moe import moe_utils

    return [(moe_utils, "te_general_gemm", None)]


def _lacks_product_of_routers(device_type: DeviceType) -> bool:
    from megatron.core.transformer.moe import moe_utils

    return not hasattr(moe_utils, "te_general_gemm")


def _sizes_of_dispatch() -> list[Replacement]:
    from megatron.core.transformer.moe import token_dispatcher

    def on_the_host(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    return [
        (token_dispatcher.MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", _STREAM),
        (token_dispatcher, "maybe_move_tensor_to_cpu", on_the_host),
    ]


def _tensor_cuda() -> list[Replacement]:
    def cuda(self, device=None, non_blocking=False, memory_format=torch.preserve_format):
        return self

    return [(torch.Tensor, "cuda", cuda)]


def _rng_state() -> list[Replacement]:
    return [
        (torch.cuda, "get_rng_state", lambda device="cuda": torch.get_rng_state()),
        (torch.cuda, "set_rng_state", lambda new_state, device="cuda": torch.set_rng_state(new_state)),
    ]


def _manual_seed() -> list[Replacement]:
    return [(torch.cuda, "manual_seed", lambda seed: torch.default_generator.manual_seed(seed))]


def _tracker_rng_state() -> list[Replacement]:
    from megatron.core.tensor_parallel import random

    def get_state(device="cuda", clone=False, graph_safe=False):
        return torch.get_rng_state()

    def set_state(new_state, device=-1, graph_safe=False):
        torch.set_rng_state(new_state)

    return [(random, "_get_cuda_rng_state", get_state), (random, "_set_cuda_rng_state", set_state)]


def _tracker_warning() -> list[Replacement]:
    return [(logging.getLogger("megatron.core.tensor_parallel.random"), "disabled", True)]


def _factories() -> list[Replacement]:
    # `with torch.device(...)` knows the factories by identity and remembers them at its first use. Used first after the
    # replacement it would remember the wrappers and let the originals, which they call, pass by.
    from torch.utils._device import _device_constructors

    _device_constructors()

    def without_cuda(factory):
        @functools.wraps(factory)
        def wrapper(*args, device=None, pin_memory=False, **kwargs):
            if device is not None and torch.device(device).type == "cuda":
                device = None
            return factory(*args, device=device, **kwargs)

        return wrapper

    names = ["tensor", "zeros", "empty", "empty_like"]
    return [(torch, name, without_cuda(getattr(torch, name))) for name in names]


def _tensor_type() -> list[Replacement]:
    original = torch.Tensor.type

    @functools.wraps(original)
    def tensor_type(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    return [(torch.Tensor, "type", tensor_type)]


def _rotation_of_packs() -> list[Replacement]:
    from megatron.core.models.common.embeddings import rope_utils

    stock = rope_utils._apply_rotary_pos_emb_thd

    @functools.wraps(stock)
    def rotate(t, cu_seqlens, freqs, rotary_interleaved=False, *args, mscale=1.0, **kwargs):
        if freqs.dim() != 4 or freqs.shape[1] != 2:
            return stock(t, cu_seqlens, freqs, rotary_interleaved, *args, mscale=mscale, **kwargs)
        # [t, h, d] with cosines and sines [t, 2, 1, c] for the first c of the d channels.
        if freqs.shape[0] != t.shape[0]:
            raise ValueError(f"the pack has {freqs.shape[0]} positions on this rank, but queries or keys {t.shape[0]}")
        cos, sin = (freqs if mscale == 1.0 else freqs * mscale).to(t.dtype).unbind(1)
        channels = freqs.shape[-1]
        part = t if channels == t.shape[-1] else t[..., :channels]
        half_turned = rope_utils._rotate_half(part.unsqueeze(1), rotary_interleaved).squeeze(1)
        turned = part * cos + half_turned * sin
        return turned if part is t else torch.cat((turned, t[..., channels:]), dim=-1)

    return [(rope_utils, "_apply_rotary_pos_emb_thd", rotate)]


def _results_queue() -> list[Replacement]:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def write_results_queue(mp_mode="fork"):
        if filesystem_async._results_queue is None:
            manager = SyncManager(ctx=torch.multiprocessing.get_context("fork"))
            manager.start(initializer=die_with_parent)
            filesystem_async._results_queue = manager.Queue()
        return filesystem_async._results_queue

    # It lost its underscore in megatron-core 0.17.
    names = [
        name for name in ("get_write_results_queue", "_get_write_results_queue") if hasattr(filesystem_async, name)
    ]
    return [(filesystem_async, name, write_results_queue) for name in names]


def _adam() -> list[Replacement]:
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    return [
        (optimizer, "Adam", Adam),
        (optimizer, "USING_PYTORCH_OPTIMIZER", False),
        (distrib_optimizer, "Adam", Adam),
        (distrib_optimizer, "HAVE_APEX_OR_TE", True),
        (distrib_optimizer, "USING_APEX_OPTIMIZER", True),
    ]


def _lacks_fused_adam(device_type: DeviceType) -> bool:
    libraries = optional_libraries()
    return device_type == "cpu" or not (libraries["transformer_engine"].available or libraries["apex"].available)


ROTATION_OF_PACKS = "rotation of packs"

DIFFERENCES: tuple[Difference, ...] = (
    Difference(
        "current device",
        "torch.cuda.current_device() raises without CUDA; it is where buffers and rotary embedding go",
        _current_device,
    ),
    Difference("synchronize", "raises without CUDA; pipeline communication calls it", _synchronize),
    Difference(
        "current stream",
        "starts CUDA, which is missing; megatron-core from 0.19 on calls it at every reduction of gradients",
        _current_stream,
    ),
    Difference(
        "Tensor.cuda",
        "raises without CUDA; tied embeddings, the distributed optimizer and checkpoint exchange call it",
        _tensor_cuda,
    ),
    Difference("generator state", "torch.cuda.get_rng_state() raises; the RNG tracker reads it", _rng_state),
    Difference(
        "seed",
        "torch.cuda.manual_seed() is remembered for later and does nothing: silently, all RNG streams become equal",
        _manual_seed,
    ),
    Difference(
        "tracker state",
        "the RNG tracker sets its streams on the CUDA generator, which does not exist",
        _tracker_rng_state,
    ),
    Difference(
        "tracker warning",
        "the RNG tracker warns at each use that the CPU generator changed; here this is intended",
        _tracker_warning,
    ),
    Difference(
        "tensor factories",
        "schedules, clipping, optimizer and checkpoint loading ask for device='cuda' or pinned memory by name",
        _factories,
    ),
    Difference(
        "Tensor.type",
        "clipping and the optimizers recognise dtypes by names such as 'torch.cuda.FloatTensor'",
        _tensor_type,
    ),
    Difference(
        ROTATION_OF_PACKS,
        "reads a pack's boundaries on the host, for queries and for keys, in every layer; ours takes the cosines and "
        "sines that `model.rotary` gathers once a microbatch, and leaves tables of angles to megatron-core",
        _rotation_of_packs,
        needed=lambda device_type: True,
    ),
    Difference(
        "checkpoint results queue",
        "the writer's queue comes from a spawned manager, which imports the main module again (3 s at the first save) "
        "and outlives a killed rank",
        _results_queue,
        needed=lambda device_type: True,
    ),
    Difference(
        "product of routers",
        "megatron-core 0.16 uses a name that is undefined without Transformer Engine",
        _product_of_routers,
        needed=_lacks_product_of_routers,
    ),
    Difference(
        "sizes of dispatch",
        "the counts of tokens for experts are copied to the host only from a stream of the GPU",
        _sizes_of_dispatch,
    ),
    Difference(
        "Adam",
        "PyTorch's Adam in the distributed optimizer cannot resume; this one has the state layout of FusedAdam",
        _adam,
        needed=_lacks_fused_adam,
    ),
)


def _set(owner: Any, attribute: str, value: Any) -> None:
    if value is _MISSING:
        delattr(owner, attribute)
    else:
        setattr(owner, attribute, value)


_before: dict[str, list[Replacement]] = {}


def apply(device_type: DeviceType) -> None:
    """Put every row of `DIFFERENCES` that this device needs in place. Call it once, before building anything.

    On "cuda" that is the rotation of packs, the checkpoint queue and, without Transformer Engine and apex, Adam.
    Calling it again changes nothing.

    Raises:
        ValueError: for another device type, or for "cpu" while PyTorch sees GPUs (megatron-core would then use both).
    """
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"device type {device_type!r}: only 'cpu' and 'cuda' are supported")
    if device_type == "cpu" and torch.cuda.is_available():
        raise ValueError("PyTorch sees a GPU: set CUDA_VISIBLE_DEVICES='' to run on the CPU of this machine")
    for difference in DIFFERENCES:
        if difference.needed(device_type) and difference.name not in _before:
            _before[difference.name] = difference.apply()


def applied() -> tuple[str, ...]:
    """Names of the rows now in place."""
    return tuple(_before)


def restore() -> None:
    """Take back everything that `apply` did."""
    while _before:
        _, before = _before.popitem()
        for owner, attribute, value in before:
            _set(owner, attribute, value)
