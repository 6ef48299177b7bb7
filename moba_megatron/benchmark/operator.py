"""Benchmark of the operator: MoBA against full causal attention, in one process on one machine.

For every length, (block size, top-k), dtype and direction both are timed, routing included, and medians are compared:
on a CPU in turn, MoBA, full, MoBA, full, so that a busy neighbour slows both; on a GPU full attention once for all
(block size, top-k). Full attention is the fastest of the backends asked for, in its grouped-query mode on tensors laid
out as it likes them. Before anything is timed, a backend is compared with the reference on a short document with the
same settings; one that disagrees gets no speed.

Reported beside the times: the pair ratio, full over attended pairs with M = L / B >= K, M^2 / ((2K - 1) M - K (K - 1)),
which is what attention could gain at equal efficiency; operations per second on the attended pairs, 4 D a pair forward
and 10 D backward (five products, FlashAttention's count), and their share of the machine's bf16 peak; and extra memory,
the peak of what the call allocates less its output and gradients. Where these are not all alive at the peak, that is a
lower bound of the memory beyond them. Where the kernels screen blocks, the shares of query rows and tiles that are
scored in full after all. Results go into an output folder as `bench.csv`, `bench.md` and `bench.png`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from moba_megatron.benchmark import agreement
from moba_megatron.benchmark.calls import (
    DTYPES,
    Call,
    call_of,
    clear_inputs,
    full_call,
    kernel_errors,
    median_seconds,
    peak_bytes,
    random_inputs,
)
from moba_megatron.benchmark.inputs import chosen_inputs, hottest_load
from moba_megatron.benchmark.presets import PRESETS
from moba_megatron.benchmark.report import print_bench, write_bench
from moba_megatron.benchmark.routing import loss_disagreement, routed
from moba_megatron.benchmark.settings import BenchResult, BenchRow, BenchSettings, Case, pair_ratio
from moba_megatron.ops import Router, moba_attention, resolve_backend, resolve_full_backend
from moba_megatron.ops.layout import block_layout
from moba_megatron.planning.flops import peak_flops

LARGEST_TESTED_BLOCK = 512


def _attended_flops(settings: BenchSettings, case: Case) -> float:
    pairs = settings.num_heads * case.length**2 / 2 / pair_ratio(case.length, case.block_size, case.top_k)
    return (4 if case.mode == "fwd" else 14) * settings.head_size * pairs


def _inputs(settings: BenchSettings, length: int, dtype: str, block_size: int = 1) -> list[Tensor]:
    heads = (settings.num_heads, settings.num_kv_heads, settings.head_size)
    return chosen_inputs(settings.inputs, length, *heads, dtype, settings.device, settings.seed, block_size)


def _router_inputs(settings: BenchSettings, length: int, dtype: str, block_size: int) -> list[Tensor]:
    """Queries and keys of the router, by what they choose; none without a router."""
    if settings.router is None:
        return []
    sizes = settings.router.sizes(settings.num_heads, settings.num_kv_heads)
    place = (dtype, settings.device, settings.seed + 2, block_size)
    return chosen_inputs(settings.inputs, length, *sizes, *place)[:2]


def _moba_call(settings: BenchSettings, case: Case, backend: str) -> Call:
    tensors = _inputs(settings, case.length, case.dtype, case.block_size)
    if settings.router is not None:
        operator = routed(settings.router, backend, case.block_size, case.top_k, case.mode)
        of_router = _router_inputs(settings, case.length, case.dtype, case.block_size)
        return call_of(operator, [*tensors, *of_router], torch.ones_like(tensors[0]), case.mode)
    sizes = {"block_size": case.block_size, "top_k": case.top_k}
    return call_of(
        lambda *x: moba_attention(*x, backend=backend, **sizes), tensors, torch.ones_like(tensors[0]), case.mode
    )


@functools.lru_cache(maxsize=1)
def _hottest(settings: BenchSettings, dtype: str, length: int, block_size: int, top_k: int) -> float:
    q, k, _ = _inputs(settings, length, dtype, block_size)
    of_router = _router_inputs(settings, length, dtype, block_size)
    return hottest_load(q, k, block_size, top_k, Router(*of_router) if of_router else None)


def _scored_again(settings: BenchSettings, case: Case) -> tuple[float, float] | tuple[None, None]:
    """Shares of the rows and tiles that screening leaves to be scored again; see `ops.triton.screening`."""
    # Only here: Triton exists on Linux alone.
    from moba_megatron.ops.triton import summarize
    from moba_megatron.ops.triton.routing import shares_scored_again

    of_router = _router_inputs(settings, case.length, case.dtype, case.block_size)
    q, k = of_router or _inputs(settings, case.length, case.dtype, case.block_size)[:2]
    layout = block_layout(case.length, case.block_size, device=q.device)
    return shares_scored_again(q, summarize(k, layout), layout, case.top_k - 1) or (None, None)


def _full_calls(settings: BenchSettings, dtype: str, length: int, mode: str) -> dict[str, Callable[[], Call]]:
    """For each baseline that can run what makes its call."""
    makers = {}
    for backend in settings.full:
        try:
            name, _ = resolve_full_backend(backend, settings.device, DTYPES[dtype], settings.head_size)
        except ValueError:
            if len(settings.full) == 1:
                raise
            continue
        makers[name] = functools.partial(_full_call, settings, dtype, length, mode, name)
    return makers


def _full_call(settings: BenchSettings, dtype: str, length: int, mode: str, backend: str) -> Call:
    return full_call(_inputs(settings, length, dtype), mode, backend)


@functools.lru_cache(maxsize=1)
def _full_alone(settings: BenchSettings, dtype: str, length: int, mode: str) -> dict[str, float]:
    """Times of the baselines, one after the other, for they may fill the memory; those that fail are left out."""
    if not settings.full:
        return {}
    times, failure = {}, None
    for name, make in _full_calls(settings, dtype, length, mode).items():
        try:
            times |= median_seconds({name: make()}, settings.runs, settings.device, settings.limit)
        except RuntimeError as error:  # no kernel for these inputs, or no memory; frames would keep tensors alive
            failure = error.with_traceback(None)
    if not times:
        raise failure or ValueError(f"bench: none of {', '.join(settings.full)} can run on {settings.device}")
    return times


def disagreement(settings: BenchSettings, dtype: str, block_size: int, top_k: int) -> str | None:
    """Why the backend may not be timed with these settings: None if it agrees with the reference on a short document.

    The document has `top_k` + 2 blocks and a half, of the real size as long as the reference can hold their scores (512
    tokens), and at most two key heads with two query heads each. See `agreement` for the tolerance. FlashMoBA, which
    scores with rounded means, gets a document whose best blocks stand far apart.
    """
    tested_size = min(block_size, LARGEST_TESTED_BLOCK)
    kv_heads = min(settings.num_kv_heads, 2)
    heads = kv_heads * min(settings.num_heads // settings.num_kv_heads, 2)
    length = (top_k + 2) * tested_size + tested_size // 2 + 1
    sizes = (length, heads, kv_heads, settings.head_size, dtype, settings.device)
    backend = resolve_backend(settings.backend, settings.device, DTYPES[dtype])[0]
    if backend == "flash_moba":
        q, k, v = clear_inputs(*sizes, settings.seed, tested_size)
    else:
        q, k, v = random_inputs(*sizes, settings.seed)
    dout = random_inputs(*sizes, settings.seed + 1)[0]
    if settings.router is not None:
        of_router = _router_on(settings, length, heads, kv_heads, dtype)
        routed_here = routed(settings.router, backend, tested_size, top_k, "fwd")
        return agreement.disagreement(
            lambda *x: routed_here(*x, *of_router),
            *(q, k, v, dout),
            block_size=tested_size,
            top_k=top_k,
            router=Router(*of_router),
        ) or loss_disagreement(settings.router, backend, [q, k, v, *of_router], tested_size, top_k)

    def operator(*tensors: Tensor) -> Tensor:
        return moba_attention(*tensors, block_size=tested_size, top_k=top_k, backend=backend)

    return agreement.disagreement(operator, q, k, v, dout, block_size=tested_size, top_k=top_k)


def _router_on(settings: BenchSettings, length: int, heads: int, kv_heads: int, dtype: str) -> list[Tensor]:
    """Queries and keys of the router on the document of the gate."""
    sizes = settings.router.sizes(heads, kv_heads)
    return random_inputs(length, *sizes, dtype, settings.device, settings.seed + 2)[:2]


def _times(settings: BenchSettings, case: Case, backend: str, with_flash_moba: bool) -> tuple[dict[str, float], int]:
    """Seconds of `moba`, of `flash_moba` where asked for, and of each baseline; and the peak of MoBA's bytes."""
    timing = {"runs": settings.runs, "device": settings.device, "limit": settings.limit}
    full = (case.dtype, case.length, case.mode)
    call = _moba_call(settings, case, backend)
    peak = peak_bytes(call, settings.device)
    if settings.device == "cpu":
        calls = {"moba": call} | {name: make() for name, make in _full_calls(settings, *full).items()}
        return median_seconds(calls, **timing), peak
    # One after the other, for each may fill the memory.
    times = median_seconds({"moba": call}, **timing)
    del call
    if with_flash_moba:
        times |= median_seconds({"flash_moba": _moba_call(settings, case, "flash_moba")}, **timing)
    return times | _full_alone(settings, *full), peak


def measure(settings: BenchSettings, case: Case, with_flash_moba: bool = False) -> BenchRow:
    """Time one case."""
    backend, _ = resolve_backend(settings.backend, settings.device, DTYPES[case.dtype])
    q_bytes = case.length * settings.num_heads * settings.head_size * DTYPES[case.dtype].itemsize
    gradients = q_bytes * (1 + 2 * settings.num_kv_heads / settings.num_heads) if case.mode == "fwd+bwd" else 0
    times, peak = _times(settings, case, backend, with_flash_moba)
    extra = max(0, int(peak - q_bytes - gradients))
    moba, flash_moba = times.pop("moba"), times.pop("flash_moba", None)
    dense_by = min(times, key=times.__getitem__, default="")
    dense = times.get(dense_by)
    rows, tiles = _scored_again(settings, case) if backend == "triton" else (None, None)
    flops = _attended_flops(settings, case) / moba
    most_flops = peak_flops(torch.cuda.get_device_name()) if settings.device == "cuda" else None
    return BenchRow(
        dtype=case.dtype,
        num_heads=settings.num_heads,
        num_kv_heads=settings.num_kv_heads,
        length=case.length,
        block_size=case.block_size,
        top_k=case.top_k,
        mode=case.mode,
        backend=backend,
        moba_seconds=moba,
        dense_seconds=dense,
        dense_by=dense_by,
        speedup=None if dense is None else dense / moba,
        pair_ratio=pair_ratio(case.length, case.block_size, case.top_k),
        attended_flops=flops,
        share_of_peak=None if most_flops is None else flops / most_flops,
        extra_bytes=extra,
        inputs=settings.inputs,
        hottest=_hottest(settings, case.dtype, case.length, case.block_size, case.top_k),
        extra_over_q=extra / q_bytes,
        flash_moba_seconds=flash_moba,
        rows_scored_again=rows,
        tiles_scored_again=tiles,
        floor=case.floor,
        goal=case.goal,
        router=settings.router.words if settings.router else "",
    )


def run_bench(
    settings: BenchSettings, output: str | Path, *, preset: str | None = None, console: Console | None = None
) -> BenchResult:
    """Measure everything the settings ask for, print a table, and write `bench.csv`, `bench.md` and `bench.png`.

    Args:
        settings: what to measure; a preset changes what it names and leaves the rest.
        output: folder for the files, made if missing.
        preset: a name in `presets.PRESETS`.
        console: where to print; None for the terminal.

    Raises:
        ValueError: an unknown preset, a backend that cannot run on the device, or something that is not measured with
            a router.
    """
    if settings.router is not None and (settings.backend == "flash_moba" or preset == "targets"):
        what = "backend flash_moba has none" if settings.backend == "flash_moba" else "the targets are of MoBA"
        raise ValueError(f"bench: --router-dim {settings.router.dim}, but {what}: leave one of the two out")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"bench: unknown preset {preset!r}; choose from {list(PRESETS)}")
    resolve_backend(settings.backend, settings.device)
    console = console or Console()
    result = BenchResult()
    threads = torch.get_num_threads()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        for some, cases in _parts(settings, preset):
            for _ in _measure_all(some, cases, result, console):
                write_bench(result, Path(output), only_csv=True)
    finally:
        torch.set_num_threads(threads)
        _full_alone.cache_clear()
    write_bench(result, Path(output))
    print_bench(result, console)
    return result


def _parts(settings: BenchSettings, preset: str | None) -> Iterable[tuple[BenchSettings, list[Case]]]:
    """Settings with their cases; those of one length and mode follow each other."""
    if preset == "targets":
        yield settings, [Case(*target) for target in PRESETS["targets"]]
        return
    for change in [{}] if preset is None else PRESETS[preset]:
        some = replace(settings, **change)
        yield (
            some,
            [
                Case(dtype, length, block_size, top_k, mode)
                for dtype in some.dtypes
                for mode in some.modes
                for length in some.lengths
                for block_size, top_k in some.blocks
            ],
        )


def _measure_all(
    settings: BenchSettings, cases: list[Case], result: BenchResult, console: Console
) -> Iterator[BenchRow]:
    """Add rows and refusals to the result; yields every row as it is there."""
    gate = _Gate(settings, result, console)
    with_flash_moba = settings.device == "cuda" and settings.router is None
    for case in cases:
        if case.block_size * case.top_k >= case.length:
            result.full.append(f"{case}: top_k blocks cover the document, MoBA is full attention there")
            continue
        try:
            if not gate.passes(settings.backend, case):
                continue
            console.print(
                f"measuring {case.dtype} L = {case.length} ({case.block_size}, {case.top_k}) {case.mode}", style="dim"
            )
            row = measure(settings, case, with_flash_moba and gate.passes_flash_moba(case))
        except torch.OutOfMemoryError:
            result.refused.append(f"{case}: out of GPU memory")
            continue
        except kernel_errors() as error:
            # The others may well compile and fit this chip.
            words = next(iter(str(error).splitlines()), "")
            result.refused.append(f"{case}: {type(error).__name__}: {words}")
            console.print(f"no speed reported for {result.refused[-1]}", style="red", markup=False)
            continue
        result.rows.append(row)
        yield row


class _Gate:
    """Lets a backend pass that agrees with the reference; looks once for each dtype, block size and top-k."""

    def __init__(self, settings: BenchSettings, result: BenchResult, console: Console):
        self.settings, self.result, self.console = settings, result, console
        self.verdicts: dict[tuple, str | None] = {}

    def passes(self, backend: str, case: Case) -> bool:
        key = (backend, case.dtype, case.block_size, case.top_k)
        if key not in self.verdicts:
            self.verdicts[key] = self._look(*key)
        return self.verdicts[key] is None

    def passes_flash_moba(self, case: Case) -> bool:
        """Whether FlashMoBA is here, takes this case and agrees."""
        try:
            resolve_backend("flash_moba", self.settings.device, DTYPES[case.dtype])
            return self.passes("flash_moba", case)
        except ValueError:
            return False

    def _look(self, backend: str, dtype: str, block_size: int, top_k: int) -> str | None:
        verdict = disagreement(replace(self.settings, backend=backend), dtype, block_size, top_k)
        if verdict:
            heads = f"{self.settings.num_heads}/{self.settings.num_kv_heads} heads"
            self.result.refused.append(f"{backend} {dtype} ({block_size}, {top_k}) {heads}: {verdict}")
            self.console.print(f"[red]no speed reported for {self.result.refused[-1]}")
        return verdict
