"""`moba-megatron bench --model`: the time that `kernel_model` expects of the kernels, on four machines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from moba_megatron.benchmark.presets import GPU_BLOCKS, GPU_HEAD_SIZE, GPU_HEADS, GPU_LENGTHS
from moba_megatron.benchmark.report import print_table, write_csv
from moba_megatron.planning.kernel_model import (
    MACHINES,
    AttentionSizes,
    Machine,
    backward_work,
    dense_seconds,
    expected_seconds,
    forward_work,
)

# Where single kernels are shown.
DETAIL_TOKENS, DETAIL_MACHINE = 2**17, "H200"


@dataclass(frozen=True)
class ModelRow:
    """Expected seconds of one setting on one machine, bf16; `full` is the best full causal attention."""

    machine: str
    num_heads: int
    num_kv_heads: int
    length: int
    block_size: int
    top_k: int
    forward_seconds: float
    both_seconds: float
    full_forward_seconds: float
    full_both_seconds: float


def model_rows() -> list[ModelRow]:
    """Every machine and every setting of the GPU grid whose blocks do not cover the whole document."""
    rows = []
    for heads, kv_heads in GPU_HEADS:
        for length in GPU_LENGTHS:
            for block_size, top_k in GPU_BLOCKS:
                if block_size * top_k < length:
                    sizes = AttentionSizes(length, heads, kv_heads, GPU_HEAD_SIZE, block_size, top_k)
                    rows += [_row(sizes, machine) for machine in MACHINES]
    return rows


def _row(sizes: AttentionSizes, machine: Machine) -> ModelRow:
    times = (
        seconds(sizes, machine, backward) for seconds in (expected_seconds, dense_seconds) for backward in (False, True)
    )
    return ModelRow(
        machine.name, sizes.heads, sizes.kv_heads, sizes.tokens, sizes.block_size, sizes.top_k, *times
    )  # fmt: skip


def run_model(output: Path, console: Console) -> list[ModelRow]:
    """Print the expected times of the grid and of single kernels, and write `model.csv`."""
    rows = model_rows()
    output.mkdir(parents=True, exist_ok=True)
    write_csv(output / "model.csv", ModelRow, rows)
    names = [machine.name for machine in MACHINES]
    for heads, kv_heads in GPU_HEADS:
        settings: dict[tuple[int, int, int], dict[str, ModelRow]] = {}
        for row in rows:
            if (row.num_heads, row.num_kv_heads) == (heads, kv_heads):
                settings.setdefault((row.length, row.block_size, row.top_k), {})[row.machine] = row
        title = f"expected ms forward / forward + backward (times faster than full), N = {heads}, G = {kv_heads}, bf16"
        lines = [
            [f"{length}", f"{block}, {top_k}", *(_cell(by_machine[name]) for name in names)]
            for (length, block, top_k), by_machine in settings.items()
        ]
        print_table(console, title, ["L", "B, K", *names], lines)
    _print_kernels(console)
    console.print("Expected from data sheets and assumed efficiencies (planning/kernel_model.py), not measured.")
    return rows


def _cell(row: ModelRow) -> str:
    forward, both = row.forward_seconds, row.both_seconds
    faster = f"{row.full_forward_seconds / forward:.1f} / {row.full_both_seconds / both:.1f}"
    return f"{forward * 1e3:.3g} / {both * 1e3:.3g} ({faster})"


def _print_kernels(console: Console) -> None:
    machine = next(machine for machine in MACHINES if machine.name == DETAIL_MACHINE)
    (heads, kv_heads), *_ = GPU_HEADS
    lines = []
    for block_size, top_k in GPU_BLOCKS:
        sizes = AttentionSizes(DETAIL_TOKENS, heads, kv_heads, GPU_HEAD_SIZE, block_size, top_k)
        for direction, works in (("forward", forward_work(sizes)), ("backward", backward_work(sizes))):
            for work in works:
                numbers = (work.products / 1e12, work.bytes / 1e9, work.seconds(machine) * 1e3)
                lines.append([f"{block_size}, {top_k}", direction, work.name, *(f"{n:.3g}" for n in numbers)])
    title = f"kernels at {DETAIL_TOKENS} tokens on {machine.name}, N = {heads}, G = {kv_heads}, bf16"
    print_table(console, title, ["B, K", "pass", "kernel", "TFLOP", "GB", "expected ms"], lines)
