"""What benchmarks print and write: tables, CSV, Markdown and plots, from rows that are dataclasses."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from moba_megatron.benchmark.settings import BenchResult, BenchRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Columns that tables need; a pipe or file is taken to be at least as wide.
TABLE_WIDTH = 150

Cells = Sequence[Sequence[str]]


def wide_enough(console: Console) -> Console:
    """The console, or one on the same file with room for a table's columns if that file is not a terminal."""
    narrow = not console.is_terminal and console.width < TABLE_WIDTH
    return Console(file=console.file, width=TABLE_WIDTH) if narrow else console


def print_table(console: Console, title: str, headings: Sequence[str], lines: Cells) -> None:
    """Print a table, on as wide a console as it needs."""
    table = Table(*headings, title=title)
    for line in lines:
        table.add_row(*line)
    wide_enough(console).print(table)


def write_csv(path: Path, row_type: type, rows: Iterable[Any]) -> None:
    """Write dataclass rows with their fields as columns, unrounded."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(row_type)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def write_markdown(path: Path, headings: Sequence[str], lines: Cells, notes: Sequence[str] = ()) -> None:
    """Write a table, and a paragraph for each note."""
    table = [headings, ["---"] * len(headings), *lines]
    text = "".join(f"| {' | '.join(line)} |\n" for line in table)
    path.write_text(text + "".join(f"\n{note}\n" for note in notes), encoding="utf-8")


def new_figure(width: float, height: float) -> Figure:
    """A figure that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


HEADINGS = (
    "dtype",
    "N, G",
    "L",
    "B, K",
    "mode",
    "MoBA s",
    "full s",
    "full by",
    "speed-up",
    "pair ratio",
    "hottest",
    "GFLOP/s",
    "of peak",
    "extra / q",
    "FlashMoBA s",
    "rows, tiles scored again",
    "floor",
    "goal",
    "router",
)


def _cells(row: BenchRow) -> list[str]:
    def optional(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        row.dtype,
        f"{row.num_heads}, {row.num_kv_heads}",
        f"{row.length}",
        f"{row.block_size}, {row.top_k}",
        row.mode,
        f"{row.moba_seconds:.4g}",
        optional(row.dense_seconds, ".4g"),
        row.dense_by,
        optional(row.speedup, ".2f"),
        f"{row.pair_ratio:.1f}",
        f"{row.hottest:.1f}x",
        f"{row.attended_flops / 1e9:.0f}",
        optional(row.share_of_peak, ".1%"),
        f"{row.extra_over_q:.2f}",
        optional(row.flash_moba_seconds, ".4g"),
        _shares(row.rows_scored_again, row.tiles_scored_again),
        optional(row.floor, "g"),
        optional(row.goal, "g"),
        row.router,
    ]


def _shares(*shares: float | None) -> str:
    return "" if None in shares else ", ".join(f"{share:.2%}" for share in shares)


def _table(rows: list[BenchRow]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines, without the columns that no row fills."""
    lines = [_cells(row) for row in rows]
    filled = [i for i in range(len(HEADINGS)) if not lines or any(line[i] for line in lines)]
    return [HEADINGS[i] for i in filled], [[line[i] for i in filled] for line in lines]


def print_bench(result: BenchResult, console: Console) -> None:
    """The table, and from which length on MoBA wins."""
    print_table(console, "MoBA against full causal attention (medians)", *_table(result.rows))
    for key, length in result.crossovers().items():
        shortest = min(row.length for row in result.rows if row.curve == key)
        later = "at every measured length" if length == shortest else f"from {length} tokens on"
        where = "at no measured length" if length is None else later
        console.print(f"MoBA {_label(key)} beats full attention {where}.")


def write_bench(result: BenchResult, folder: Path, only_csv: bool = False) -> None:
    """Write `bench.csv`, and unless told otherwise `bench.md` and `bench.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "bench.csv", BenchRow, result.rows)
    if only_csv:
        return
    notes = [f"No speed reported for {reason}" for reason in [*result.refused, *result.full]]
    write_markdown(folder / "bench.md", *_table(result.rows), notes=notes)
    _plot(result.rows, folder / "bench.png")


def _label(curve: tuple) -> str:
    dtype, heads, kv_heads, block_size, top_k, mode = curve
    return f"({block_size}, {top_k}) {dtype} {heads}/{kv_heads} heads {mode}"


def _plot(rows: list[BenchRow], path: Path) -> None:
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    rows = [row for row in rows if row.speedup is not None]
    for key in sorted({row.curve for row in rows}):
        curve = sorted((row.length, row.speedup) for row in rows if row.curve == key)
        axes.plot(*zip(*curve, strict=True), marker="o", label=_label(key))
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xlabel="tokens", ylabel="speed-up over full causal attention", xscale="log", yscale="log")
    if rows:
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
