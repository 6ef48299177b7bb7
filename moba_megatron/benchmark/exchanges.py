"""Benchmark of context parallelism: what each exchange costs in bytes and seconds, on this machine's processes or under
torchrun.

Every exchange runs forward and backward on the same random inputs, one document per length; the slowest rank counts,
and medians over the runs are reported. Bytes are counted where they arrive, the mean over the ranks, beside what the
formulas of `parallel.exchanges` say for both passes together (without summaries; for `dispatch` the bound). Before
anything is timed an exchange is compared with the definition on one rank, on a short document; one that disagrees gets
no speed.

*Selected* is the share of past blocks with keys on other ranks that at least one query of a rank chose, the mean over
the ranks: what a scheme that sends only chosen blocks would send. It belongs to the inputs, so trained keys give
another share than random ones. The load of `dispatch` is the busiest rank over the mean, before and after hot blocks
are copied; that of a ring the sum over its steps of the busiest rank's work, over a rank's mean.
"""

from __future__ import annotations

import functools
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from rich.console import Console
from torch import Tensor

from moba_megatron.benchmark.calls import DTYPES, clear_inputs
from moba_megatron.benchmark.inputs import chosen_inputs, counted_ring_factor, past_choices
from moba_megatron.benchmark.report import new_figure, print_table, write_csv, write_markdown
from moba_megatron.benchmark.settings import BenchSettings
from moba_megatron.ops import moba_attention, select_blocks
from moba_megatron.parallel.attention import ContextGroups, context_attention
from moba_megatron.parallel.exchange_kind import RankSizes
from moba_megatron.parallel.exchanges import EXCHANGES, refusal, ring_ranks, traffic
from moba_megatron.parallel.layout import shard_positions
from moba_megatron.parallel.wire import observe

AGREEMENT_TOKENS = 1024
# Largest difference by dtype, as a part of the largest element.
AGREEMENT = {"fp64": 1e-10, "fp32": 1e-4, "fp16": 0.01, "bf16": 0.03}


@dataclass(frozen=True)
class ContextRow:
    """One exchange at one setting. Bytes are received per rank; times in seconds; block size None: full attention."""

    dtype: str
    length: int
    block_size: int | None
    top_k: int | None
    exchange: str
    forward_seconds: float
    backward_seconds: float
    forward_bytes: int
    backward_bytes: int
    formula_bytes: int
    selected: float | None
    load: str

    @property
    def kind(self) -> str:
        return "full" if self.block_size is None else f"{self.block_size}, {self.top_k}"


@dataclass
class ContextBench:
    """What was measured, and which exchanges were not because they disagree with the definition."""

    rows: list[ContextRow] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def run_context_bench(settings: BenchSettings, context_size: int, output: Path, console: Console) -> ContextBench:
    """Measure all exchanges, print a table, write `context.csv`, `context.md` and `context.png`.

    Under torchrun every rank calls this and the processes are its; otherwise `context_size` processes are started here.

    Raises:
        ValueError: lengths that are no multiple of 2 x context size, or a torchrun of another size.
    """
    unit = 2 * context_size
    for length in settings.lengths:
        if length % unit:
            raise ValueError(
                f"bench: {length} tokens are not a multiple of 2 x context-parallel size = {unit}: "
                f"use {-(-length // unit) * unit}"
            )
    if "RANK" in os.environ:
        ranks, here, number, _ = map(_launched, ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "RANK"))
        if ranks != context_size:
            raise ValueError(f"bench: {ranks} processes, but --context-parallel {context_size}")
        _prepare_rank(settings, here, number)
        dist.init_process_group(_backend(settings))
        result = _measure_all(settings, context_size)
    else:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(_rank_main, (settings, context_size, folder), nprocs=context_size)
            result = torch.load(Path(folder) / "result", weights_only=False)
    if int(os.environ.get("RANK", "0")) == 0:
        title = "exchanges of context parallelism, per rank and layer (medians, slowest rank)"
        print_table(console, title, _HEADINGS, [_cells(row) for row in result.rows])
        _write(result.rows, output)
    return result


def _launched(name: str) -> int:
    """A number that torchrun tells its processes."""
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise ValueError(
            f"bench: {name} = {text!r} is not a number: start with torchrun, or take RANK out of the environment"
        )
    return int(text)


def _backend(settings: BenchSettings) -> str:
    return "nccl" if settings.device == "cuda" else "gloo"


def _prepare_rank(settings: BenchSettings, local_ranks: int, local_rank: int) -> None:
    torch.set_num_threads(settings.threads or max(1, len(os.sched_getaffinity(0)) // local_ranks))
    if settings.device == "cuda":
        torch.cuda.set_device(local_rank)


def _rank_main(rank: int, settings: BenchSettings, context_size: int, folder: str) -> None:
    _prepare_rank(settings, context_size, rank)
    dist.init_process_group(_backend(settings), init_method=f"file://{folder}/meet", rank=rank, world_size=context_size)
    result = _measure_all(settings, context_size)
    if rank == 0:
        torch.save(result, Path(folder) / "result")
    dist.barrier()
    # Without destroying the group: gloo aborts once in a while after a clean end.
    sys.stdout.flush()
    os._exit(0)


def _measure_all(settings: BenchSettings, context_size: int) -> ContextBench:
    result = ContextBench()
    for dtype in settings.dtypes:
        for length in settings.lengths:
            for block_size, top_k in (*settings.blocks, (None, None)):
                sizes = RankSizes(
                    length // context_size, settings.num_heads, settings.num_kv_heads, settings.head_size,
                    DTYPES[dtype].itemsize, block_size, top_k,
                )  # fmt: skip
                for exchange in EXCHANGES:
                    if block_size is None and not EXCHANGES[exchange].suits_full:
                        continue
                    reason = refusal(exchange, sizes, context_size)
                    if reason is None and (reason := _disagreement(settings, dtype, sizes, exchange)):
                        result.wrong.append(reason)
                    if reason is None:
                        result.rows.append(_measure(settings, dtype, length, sizes, exchange))
                    elif dist.get_rank() == 0:
                        print(f"left out: {reason}", flush=True)
    return result


@functools.cache
def _groups(exchange: str, levels: tuple[int, int]) -> ContextGroups:
    whole = dist.group.WORLD
    if not EXCHANGES[exchange].two_levels:
        return ContextGroups(whole)
    inner, outer = levels
    neighbours = [list(range(i * inner, (i + 1) * inner)) for i in range(outer)]
    across = [list(range(i, inner * outer, inner)) for i in range(inner)]
    mine = [dist.new_subgroups_by_enumeration(ranks)[0] for ranks in (neighbours, across)]
    return ContextGroups(whole, *mine)


def _attention(sizes: RankSizes, exchange: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    size = dist.get_world_size()
    levels = EXCHANGES[exchange].levels(size, sizes) or (1, size)
    return context_attention(
        q, k, v, cp_groups=_groups(exchange, levels), exchange=exchange, block_size=sizes.block_size, top_k=sizes.top_k
    )


def _inputs(settings: BenchSettings, dtype: str, length: int, block_size: int | None) -> list[Tensor]:
    """Queries, keys and values of the whole sequence, the same on all ranks."""
    heads = (settings.num_heads, settings.num_kv_heads, settings.head_size)
    made = chosen_inputs(settings.inputs, length, *heads, dtype, "cpu", settings.seed, block_size or length)
    return [x.to(settings.device) for x in made]


def _positions(length: int) -> Tensor:
    return shard_positions(torch.tensor([0, length]), dist.get_world_size(), dist.get_rank())


def _disagreement(settings: BenchSettings, dtype: str, sizes: RankSizes, exchange: str) -> str | None:
    """Why an exchange may not be timed, the same on all ranks: None if, with the backend and in the dtype that are
    timed, it agrees with the definition on one rank in fp64. The inputs leave no doubt about the choice of blocks."""
    unit = 2 * dist.get_world_size()
    length = -(-AGREEMENT_TOKENS // unit) * unit
    small = replace(sizes, block_size=sizes.block_size and min(sizes.block_size, length // 8))
    # One block that holds everything, and nothing chosen beside it, is full attention.
    blocks = {"block_size": small.block_size or length, "top_k": small.top_k or 1}
    whole = clear_inputs(
        length, settings.num_heads, settings.num_kv_heads, settings.head_size, dtype, settings.device, settings.seed,
        blocks["block_size"],
    )  # fmt: skip
    wide = [x.double().requires_grad_() for x in whole]
    expected = moba_attention(*wide, **blocks, backend="reference")
    expected.sum().backward()
    mine = _positions(length).to(settings.device)
    leaves = [x[mine].requires_grad_() for x in whole]
    out = _attention(small, exchange, *leaves)
    out.sum().backward()
    pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(leaves, wide, strict=True))]
    error = torch.stack([(ours - one[mine]).abs().max() / one.abs().max() for ours, one in pairs]).max().detach()
    dist.all_reduce(error, op=dist.ReduceOp.MAX)
    return (
        None if error <= AGREEMENT[dtype] else f"{exchange} differs from one rank by {error:.1e} of the largest element"
    )


def _measure(settings: BenchSettings, dtype: str, length: int, sizes: RankSizes, exchange: str) -> ContextRow:
    mine = _positions(length)
    q, k, v = (x[mine.to(x.device)].requires_grad_() for x in _inputs(settings, dtype, length, sizes.block_size))
    upstream = torch.ones_like(q)
    times: list[tuple[float, float]] = []
    for _ in range(settings.runs + 1):
        dist.barrier()
        with observe() as forward:
            start = time.perf_counter()
            out = _attention(sizes, exchange, q, k, v)
            middle = _now(settings)
        with observe() as backward:
            torch.autograd.grad(out, (q, k, v), upstream)
            times.append((middle - start, _now(settings) - middle))
    numbers = torch.tensor(times[1:], dtype=torch.float64, device=settings.device)
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    received = torch.tensor([forward.total, backward.total], dtype=torch.float64, device=settings.device)
    dist.all_reduce(received)
    forward_bytes, backward_bytes = (int(x) // dist.get_world_size() for x in received.tolist())
    load = forward.loads[0] if forward.loads else None
    return ContextRow(
        dtype=dtype,
        length=length,
        block_size=sizes.block_size,
        top_k=sizes.top_k,
        exchange=exchange,
        forward_seconds=statistics.median(numbers[:, 0].tolist()),
        backward_seconds=statistics.median(numbers[:, 1].tolist()),
        forward_bytes=forward_bytes,
        backward_bytes=backward_bytes,
        formula_bytes=traffic(exchange, sizes, dist.get_world_size()).total,
        selected=None if sizes.block_size is None else _selected(settings, length, sizes, dtype),
        load=f"{load.most / load.mean:.2f} -> {load.most_after / load.mean:.2f}"
        if load and load.mean
        else _ring_load(settings, length, sizes, dtype, exchange),
    )


def _now(settings: BenchSettings) -> float:
    if settings.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@functools.cache
def _ring_load(settings: BenchSettings, length: int, sizes: RankSizes, dtype: str, exchange: str) -> str:
    """How unevenly a ring works, see `parallel.ring_load`; nothing for an exchange without one."""
    size = dist.get_world_size()
    ranks = ring_ranks(exchange, size, EXCHANGES[exchange].levels(size, sizes))
    if ranks == 1 or sizes.block_size is None or sizes.top_k is None:
        return ""
    q, k, _ = _inputs(settings, dtype, length, sizes.block_size)
    choices = past_choices(q, k, sizes.block_size, sizes.top_k)
    return f"{counted_ring_factor(choices, settings.num_heads, length, sizes.block_size, ranks):.2f} in steps"


@functools.cache
def _selected(settings: BenchSettings, length: int, sizes: RankSizes, dtype: str) -> float:
    """Mean over the ranks of the share of other ranks' past blocks that some query of the rank chose."""
    q, k, _ = _inputs(settings, dtype, length, sizes.block_size)
    mine = _positions(length)
    ids = select_blocks(q, k, block_size=sizes.block_size, top_k=sizes.top_k).cpu()[mine][..., 1:]
    block = mine // sizes.block_size
    held = torch.bincount(block, minlength=length // sizes.block_size + 1)[: length // sizes.block_size]
    candidates = torch.arange(held.numel()) < block.max()
    elsewhere = candidates & (held < sizes.block_size)
    chosen = torch.zeros(held.numel() + 1, dtype=torch.bool)
    chosen[ids.flatten().long()] = True  # -1 is the last
    share = ((chosen[:-1] & elsewhere).sum() / elsewhere.sum().clamp(min=1)).to(settings.device)
    dist.all_reduce(share)
    return float(share) / dist.get_world_size()


_HEADINGS = (
    "dtype",
    "L",
    "B, K",
    "exchange",
    "fwd s",
    "bwd s",
    "fwd MiB",
    "bwd MiB",
    "formula MiB",
    "selected",
    "load",
)


def _cells(row: ContextRow) -> list[str]:
    mebibytes = (f"{n / 2**20:.2f}" for n in (row.forward_bytes, row.backward_bytes, row.formula_bytes))
    selected = "" if row.selected is None else f"{row.selected:.2f}"
    seconds = (f"{row.forward_seconds:.4f}", f"{row.backward_seconds:.4f}")
    return [row.dtype, str(row.length), row.kind, row.exchange, *seconds, *mebibytes, selected, row.load]


def _write(rows: list[ContextRow], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "context.csv", ContextRow, rows)
    write_markdown(folder / "context.md", _HEADINGS, [_cells(row) for row in rows])
    _plot(rows, folder / "context.png")


def _plot(rows: list[ContextRow], path: Path) -> None:
    figure = new_figure(8, 4.5)
    left, right = figure.subplots(1, 2)
    names = [f"{row.exchange} {row.dtype} {row.length} ({row.kind})" for row in rows]
    left.barh(names, [row.forward_seconds for row in rows], label="forward")
    left.barh(
        names, [row.backward_seconds for row in rows], left=[row.forward_seconds for row in rows], label="backward"
    )
    left.set(xlabel="seconds, slowest rank")
    left.legend(fontsize="small")
    right.barh(names, [(row.forward_bytes + row.backward_bytes) / 2**20 for row in rows])
    right.set(xlabel="MiB received per rank and layer", yticks=[])
    for axes in (left, right):
        axes.invert_yaxis()
        axes.tick_params(labelsize="x-small")
    figure.savefig(path, dpi=120)
