"""Benchmark of the operator: MoBA against PyTorch's fused full causal attention, in one process on one machine.

For every length, (block size, top-k), dtype and direction the two are timed in turn, MoBA, dense, MoBA, dense, and
medians are compared, so that a busy neighbour slows both. MoBA's time includes routing; the dense baseline runs in its
grouped-query mode on tensors laid out as it likes them, with the same threads and dtype. Before anything is timed, the
backend is held against the reference on a short document with the same settings; a setting that disagrees gets no
speed.

Reported beside the times: the pair ratio, full over attended pairs with M = L / B >= K, M^2 / ((2K - 1) M - K (K - 1)),
which is what attention could gain at equal efficiency; attended pairs per second; and extra memory, the peak of what
the call allocates less its output and gradients. Where these are not all alive at the peak, that is a lower bound of
the memory beyond them. Results go into an output folder as `bench.csv`, `bench.md` and `bench.png`.
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moba_megatron.ops import moba_attention, resolve_backend
from moba_megatron.planning import agreement

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
MODES = ("fwd", "fwd+bwd")
LARGEST_TESTED_BLOCK = 512
# Columns that the table needs; a pipe or file is taken to be at least as wide.
TABLE_WIDTH = 120
# Settings with the speed-up they must reach on two CPU threads, and the one they aim at.
TARGETS = (
    ("fp32", 32768, 512, 3, "fwd+bwd", 5.5, 9.0),
    ("bf16", 32768, 512, 3, "fwd+bwd", 5.5, 9.0),
    ("fp32", 32768, 128, 8, "fwd+bwd", 3.5, 7.0),
    ("fp32", 4096, 512, 3, "fwd+bwd", 1.0, 1.4),
    ("fp32", 131072, 512, 3, "fwd", 14.0, 25.0),
)


@dataclass(frozen=True)
class BenchSettings:
    """What to measure.

    Attributes:
        lengths: tokens of the one document.
        blocks: (block size in tokens, top-k in blocks) pairs.
        dtypes: names out of fp32, bf16, fp16, fp64.
        modes: `fwd`, `fwd+bwd`.
        num_heads, num_groups, head_size: query heads, key heads, head size.
        backend: as in `moba_attention`; `auto` is resolved and reported.
        runs: timed runs of each side, after one warm-up.
        threads: CPU threads for both; 0 leaves the process's setting.
        device: `cpu` or `cuda`.
        seed: of the random inputs.
    """

    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    blocks: tuple[tuple[int, int], ...] = ((512, 3),)
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    modes: tuple[str, ...] = MODES
    num_heads: int = 4
    num_groups: int = 2
    head_size: int = 64
    backend: str = "gathered"
    runs: int = 5
    threads: int = 0
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known, given in (("dtypes", DTYPES, self.dtypes), ("modes", MODES, self.modes)):
            unknown = [value for value in given if value not in known]
            if unknown:
                raise ValueError(f"bench: unknown {name} {unknown}; choose from {list(known)}")
        if self.runs < 1 or self.threads < 0 or not self.lengths or min(self.lengths) < 1:
            raise ValueError(
                f"bench: runs and lengths must be at least 1 and threads at least 0, "
                f"got runs {self.runs}, lengths {self.lengths}, threads {self.threads}"
            )


@dataclass(frozen=True)
class BenchRow:
    """One measured line; times in seconds, memory in bytes, floor and goal None outside the preset.

    `extra_bytes` is a lower bound of the memory beyond inputs, output and gradients, see above.
    """

    dtype: str
    length: int
    block_size: int
    top_k: int
    mode: str
    moba_seconds: float
    dense_seconds: float
    speedup: float
    pair_ratio: float
    attended_pairs_per_second: float
    extra_bytes: int
    extra_over_q: float
    floor: float | None = None
    goal: float | None = None


@dataclass
class BenchResult:
    """All rows, the settings that were refused with the reason, and the length at which MoBA starts to win."""

    rows: list[BenchRow] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def crossovers(self) -> dict[tuple[str, int, int, str], int | None]:
        """Per (dtype, block size, top-k, mode) the shortest measured length from which on MoBA is always faster."""
        curves: dict[tuple[str, int, int, str], list[BenchRow]] = {}
        for row in self.rows:
            curves.setdefault((row.dtype, row.block_size, row.top_k, row.mode), []).append(row)
        winners = {}
        for key, rows in curves.items():
            start = None
            for row in sorted(rows, key=lambda r: r.length, reverse=True):
                if row.speedup < 1:
                    break
                start = row.length
            winners[key] = start
        return winners


def pair_ratio(length: int, block_size: int, top_k: int) -> float:
    """Pairs of full causal attention over attended pairs, counted by whole blocks; 1 where top_k covers all blocks.

    >>> round(pair_ratio(32768, 512, 3), 1), round(pair_ratio(32768, 128, 8), 1)
    (13.0, 17.3)
    """
    blocks = length / block_size
    if blocks <= top_k:
        return 1.0
    return blocks**2 / ((2 * top_k - 1) * blocks - top_k * (top_k - 1))


def _attended_pairs(length: int, block_size: int, top_k: int, num_heads: int) -> float:
    return num_heads * length**2 / 2 / pair_ratio(length, block_size, top_k)


def _inputs(settings: BenchSettings, length: int, dtype: str, gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(settings.seed)
    heads = (settings.num_heads, settings.num_groups, settings.num_groups)
    shapes = [(length, h, settings.head_size) for h in heads]
    tensors = (torch.randn(shape, generator=generator).to(settings.device, DTYPES[dtype]) for shape in shapes)
    return tuple(x.requires_grad_(gradients) for x in tensors)


def _moba_call(
    settings: BenchSettings, dtype: str, length: int, block_size: int, top_k: int, mode: str
) -> Callable[[], None]:
    tensors = _inputs(settings, length, dtype, mode == "fwd+bwd")
    backend = resolve_backend(settings.backend, settings.device)[0]
    return _call(
        lambda q, k, v: moba_attention(q, k, v, block_size=block_size, top_k=top_k, backend=backend), tensors, mode
    )


def _dense_call(settings: BenchSettings, dtype: str, length: int, mode: str) -> Callable[[], None]:
    tensors = tuple(
        x.detach().transpose(0, 1).unsqueeze(0).contiguous().requires_grad_(mode == "fwd+bwd")
        for x in _inputs(settings, length, dtype, False)
    )
    gqa = settings.num_heads != settings.num_groups
    return _call(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa), tensors, mode)


def _call(operator: Callable[..., Tensor], tensors: tuple[Tensor, ...], mode: str) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            operator(*tensors)

    upstream = torch.ones_like(tensors[0])

    def both() -> None:
        for tensor in tensors:
            tensor.grad = None
        operator(*tensors).backward(upstream)

    return forward if mode == "fwd" else both


def _seconds(call: Callable[[], None], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _peak_bytes(call: Callable[[], None], device: str) -> int:
    """Most bytes that tensors made during the call held at once."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def disagreement(settings: BenchSettings, dtype: str, block_size: int, top_k: int) -> str | None:
    """Why the backend may not be timed with these settings: None if it agrees with the reference on a short document.

    The document has `top_k` + 2 blocks and a half, of the real size as long as the reference can hold their scores (512
    tokens), and at most two key heads with two query heads each. See `agreement` for the tolerance.
    """
    tested_size = min(block_size, LARGEST_TESTED_BLOCK)
    groups = min(settings.num_groups, 2)
    heads = groups * min(settings.num_heads // settings.num_groups, 2)
    small = replace(settings, num_heads=heads, num_groups=groups)
    length = (top_k + 2) * tested_size + tested_size // 2 + 1
    q, k, v = _inputs(small, length, dtype, False)
    dout = _inputs(replace(small, seed=settings.seed + 1), length, dtype, False)[0]
    backend = resolve_backend(settings.backend, settings.device)[0]

    def operator(*tensors: Tensor) -> Tensor:
        return moba_attention(*tensors, block_size=tested_size, top_k=top_k, backend=backend)

    return agreement.disagreement(operator, q, k, v, dout, block_size=tested_size, top_k=top_k)


def measure(settings: BenchSettings, dtype: str, length: int, block_size: int, top_k: int, mode: str) -> BenchRow:
    """Time one setting: medians of `runs` runs of MoBA and dense in turn, after a warm-up of each."""
    moba = _moba_call(settings, dtype, length, block_size, top_k, mode)
    dense = _dense_call(settings, dtype, length, mode)
    q_bytes = length * settings.num_heads * settings.head_size * DTYPES[dtype].itemsize
    gradients = q_bytes * (1 + 2 * settings.num_groups / settings.num_heads) if mode == "fwd+bwd" else 0
    extra = max(0, int(_peak_bytes(moba, settings.device) - q_bytes - gradients))
    moba(), dense()
    times = [(_seconds(moba, settings.device), _seconds(dense, settings.device)) for _ in range(settings.runs)]
    moba_seconds, dense_seconds = (statistics.median(column) for column in zip(*times, strict=True))
    return BenchRow(
        dtype=dtype,
        length=length,
        block_size=block_size,
        top_k=top_k,
        mode=mode,
        moba_seconds=moba_seconds,
        dense_seconds=dense_seconds,
        speedup=dense_seconds / moba_seconds,
        pair_ratio=pair_ratio(length, block_size, top_k),
        attended_pairs_per_second=_attended_pairs(length, block_size, top_k, settings.num_heads) / moba_seconds,
        extra_bytes=extra,
        extra_over_q=extra / q_bytes,
    )


def run_bench(
    settings: BenchSettings, output: str | Path, *, preset: str | None = None, console: Console | None = None
) -> BenchResult:
    """Measure everything the settings ask for, print a table, and write `bench.csv`, `bench.md` and `bench.png`.

    Args:
        settings: what to measure; with a preset only heads, backend, runs, threads, device and seed are taken from it.
        output: folder for the files, made if missing.
        preset: `targets` measures the rows of `TARGETS` and adds their floor and goal.
        console: where to print; None for the terminal.

    Raises:
        ValueError: an unknown preset, or a backend that cannot run on the device.
    """
    if preset not in (None, "targets"):
        raise ValueError(f"bench: unknown preset {preset!r}; the one preset is 'targets'")
    resolve_backend(settings.backend, settings.device)
    console = console or Console()
    threads = torch.get_num_threads()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    try:
        result = _measure_all(settings, _cases(settings, preset), console)
    finally:
        torch.set_num_threads(threads)
    _write(result, Path(output))
    wide_enough(console).print(_table(result))
    for key, length in result.crossovers().items():
        dtype, block_size, top_k, mode = key
        shortest = min(row.length for row in result.rows if (row.dtype, row.block_size, row.top_k, row.mode) == key)
        later = "at every measured length" if length == shortest else f"from {length} tokens on"
        where = "at no measured length" if length is None else later
        console.print(f"MoBA ({block_size}, {top_k}) {dtype} {mode} beats full attention {where}.")
    return result


def wide_enough(console: Console) -> Console:
    """The console, or one on the same file with room for the table's columns if that file is no terminal."""
    narrow = not console.is_terminal and console.width < TABLE_WIDTH
    return Console(file=console.file, width=TABLE_WIDTH) if narrow else console


Case = tuple[str, int, int, int, str, float | None, float | None]


def _cases(settings: BenchSettings, preset: str | None) -> list[Case]:
    if preset == "targets":
        return list(TARGETS)
    return [
        (dtype, length, block_size, top_k, mode, None, None)
        for dtype in settings.dtypes
        for block_size, top_k in settings.blocks
        for mode in settings.modes
        for length in settings.lengths
    ]


def _measure_all(settings: BenchSettings, cases: Iterable[Case], console: Console) -> BenchResult:
    result, verdicts = BenchResult(), {}
    for dtype, length, block_size, top_k, mode, floor, goal in cases:
        key = (dtype, block_size, top_k)
        if key not in verdicts:
            verdicts[key] = disagreement(settings, *key)
            if verdicts[key]:
                result.refused.append(f"{dtype} ({block_size}, {top_k}): {verdicts[key]}")
                console.print(f"[red]no speed reported for {result.refused[-1]}")
        if verdicts[key] is None:
            console.print(f"measuring {dtype} L = {length} ({block_size}, {top_k}) {mode}", style="dim")
            row = measure(settings, dtype, length, block_size, top_k, mode)
            result.rows.append(replace(row, floor=floor, goal=goal))
    return result


def _cells(row: BenchRow) -> list[str]:
    bounds = [f"{bound:g}" if bound is not None else "" for bound in (row.floor, row.goal)]
    return [
        row.dtype,
        f"{row.length}",
        f"{row.block_size}, {row.top_k}",
        row.mode,
        f"{row.moba_seconds:.4f}",
        f"{row.dense_seconds:.4f}",
        f"{row.speedup:.2f}",
        f"{row.pair_ratio:.1f}",
        f"{row.attended_pairs_per_second / 1e6:.0f}",
        f"{row.extra_over_q:.2f}",
        *bounds,
    ]


_HEADINGS = (
    "dtype",
    "L",
    "B, K",
    "mode",
    "MoBA s",
    "dense s",
    "speed-up",
    "pair ratio",
    "Mpairs/s",
    "extra / q",
    "floor",
    "goal",
)


def _table(result: BenchResult) -> Table:
    table = Table(*_HEADINGS, title="MoBA against full causal attention (medians)")
    for row in result.rows:
        table.add_row(*_cells(row))
    return table


def _write(result: BenchResult, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "bench.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(BenchRow)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in result.rows)
    lines = [" | ".join(_HEADINGS), " | ".join("---" for _ in _HEADINGS), *(" | ".join(_cells(r)) for r in result.rows)]
    refused = [f"\nNo speed reported for {reason}" for reason in result.refused]
    (folder / "bench.md").write_text("\n".join([f"| {line} |" for line in lines] + refused) + "\n")
    _plot(result.rows, folder / "bench.png")


def _plot(rows: list[BenchRow], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key in sorted({(row.dtype, row.block_size, row.top_k, row.mode) for row in rows}):
        curve = sorted((r.length, r.speedup) for r in rows if (r.dtype, r.block_size, r.top_k, r.mode) == key)
        axes.plot(*zip(*curve, strict=True), marker="o", label=f"{key[0]} ({key[1]}, {key[2]}) {key[3]}")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xlabel="tokens", ylabel="speed-up over full causal attention", xscale="log", yscale="log")
    if rows:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
