"""The calls that benchmarks time: inputs, forward or forward + backward of an operator, its seconds and its memory."""

from __future__ import annotations

import importlib.util
import math
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from moba_megatron.ops import full_attention
from moba_megatron.ops.adapters import FLASH_ATTENTION

# By the names that settings have.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

Call = Callable[[], None]
# Seconds that a timed run on a GPU takes at least.
_SHORTEST_RUN = 0.02


def kernel_errors() -> tuple[type[Exception], ...]:
    """What is raised where kernels do not compile, do not fit the chip or its memory, or fail on it."""
    if importlib.util.find_spec("triton") is None:
        return (RuntimeError,)
    from triton.errors import TritonError

    return RuntimeError, TritonError


def random_inputs(
    length: int, heads: int, kv_heads: int, head_size: int, dtype: str, device: str, seed: int
) -> list[Tensor]:
    """q [T, N, D], k and v [T, G, D] from a standard normal; made on the device, so other devices draw others."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = [(length, h, head_size) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(DTYPES[dtype])
            for shape in shapes]  # fmt: skip


def clear_inputs(
    length: int, heads: int, kv_heads: int, head_size: int, dtype: str, device: str, seed: int, block_size: int
) -> list[Tensor]:
    """Inputs whose best blocks stand far apart, also where block means are rounded to 8 bits.

    Keys vary freely about their block's mean, which is zero but for one coordinate: there the blocks have distinct
    levels between 0 and 1. Queries have at least 1 there, with either sign, so that half of them want the highest
    levels and half the lowest.
    """
    q, k, v = random_inputs(length, heads, kv_heads, head_size, "fp32", device, seed)
    blocks = -(-length // block_size)
    generator = torch.Generator().manual_seed(seed)
    levels = (torch.randperm(blocks, generator=generator) / blocks).to(device)
    for number, block in enumerate(k.split(block_size)):
        block -= block.mean(0)
        block[..., 0] += levels[number]
    sign = torch.where(q[..., 0] < 0, -1.0, 1.0)
    q[..., 0] = sign * (1 + q[..., 0].abs())
    return [x.to(DTYPES[dtype]) for x in (q, k, v)]


def full_call(tensors: list[Tensor], mode: str, backend: str) -> Call:
    """Full causal attention by a backend, on tensors laid out as it likes them."""
    if backend == "torch_flash" or backend in FLASH_ATTENTION:
        return call_of(lambda *x: full_attention(*x, backend=backend), tensors, torch.ones_like(tensors[0]), mode)
    heads_first = [x.transpose(0, 1).contiguous() for x in tensors]
    upstream = torch.ones_like(heads_first[0]).transpose(0, 1)
    return call_of(
        lambda *x: full_attention(*(y.transpose(0, 1) for y in x), backend=backend), heads_first, upstream, mode
    )


def call_of(
    operator: Callable[..., Tensor | tuple[Tensor, Tensor]], tensors: list[Tensor], upstream: Tensor, mode: str
) -> Call:
    """A call without arguments that runs the operator forward, or forward and backward from `upstream`; and from a
    loss, if the operator gives one as well."""
    leaves = [x.detach().requires_grad_(mode == "fwd+bwd") for x in tensors]

    def forward() -> None:
        with torch.no_grad():
            operator(*leaves)

    def both() -> None:
        for leaf in leaves:
            leaf.grad = None
        found = operator(*leaves)
        if isinstance(found, tuple):
            torch.autograd.backward(found, (upstream, torch.ones_like(found[1])))
        else:
            found.backward(upstream)

    return forward if mode == "fwd" else both


def seconds_of(call: Call, device: str, calls: int = 1) -> float:
    """Time of one call; on a GPU that of so many in a row between two events of its stream, over their number."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def calls_in(shortest: float, seconds: float) -> int:
    """How many calls of so many seconds make a run of at least `shortest` seconds; no more than 20.

    >>> calls_in(0.02, 0.003), calls_in(0.02, 1.0), calls_in(0.02, 1e-6)
    (7, 1, 20)
    """
    return max(1, min(20, math.ceil(shortest / seconds)))


def median_seconds(calls: dict[str, Call], runs: int, device: str, limit: float | None) -> dict[str, float]:
    """Medians of `runs` runs of each call in turn, after a warm-up of each.

    A run of a short call on a GPU is several in a row, as in training: the host prepares the next while one runs. Once
    `limit` seconds are spent there are no further runs; if the warm-up took that long, it counts itself.
    """
    started = time.perf_counter()
    times = {name: [seconds_of(call, device)] for name, call in calls.items()}
    in_a_row = dict.fromkeys(calls, 1)
    if device != "cpu" and (limit is None or time.perf_counter() - started < limit):
        # A first call may compile.
        in_a_row = {name: calls_in(_SHORTEST_RUN, seconds_of(call, device)) for name, call in calls.items()}
    for run in range(runs):
        if limit is not None and time.perf_counter() - started > limit:
            break
        for name, call in calls.items():
            seconds = seconds_of(call, device, in_a_row[name])
            times[name] = [*times[name], seconds] if run else [seconds]
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(call: Call, device: str) -> int:
    """Most bytes that tensors made during the call held at once."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # The profiler announces each start and stop at a level above errors. It reads this when it is used first.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
