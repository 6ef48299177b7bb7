"""Search for faster tile shapes of the Triton kernels on this GPU: `moba-megatron bench --tune`.

For each block size, dtype and kernel, every candidate (query rows, keys if the kernel streams them, warps, stages)
replaces the present tile, and the whole call is timed: forward for the kernels of the forward pass, forward and
backward for the others. Candidates that do not compile or do not fit the chip are skipped. The fastest one is timed
again next to the present tile. It wins if it is clearly faster and the operator still agrees with the definition. If
several block sizes share an entry of the table, it is tuned for the first of them. After each block size the table of
all architectures, with the changes, is written to a file that can replace `ops/triton/tile_table.py`. The compile tests
check whether the winners spill registers. Most of the time is compilation: some minutes for each block size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console

from moba_megatron.benchmark.calls import DTYPES, call_of, kernel_errors, median_seconds, random_inputs
from moba_megatron.benchmark.operator import disagreement
from moba_megatron.benchmark.settings import BenchSettings
from moba_megatron.ops import moba_attention, resolve_backend
from moba_megatron.ops.kernel_sizes import screens

Tile = tuple[int, int, int, int]
Choices = dict[str, dict[tuple[int, int], list[Tile]]]

ROWS, KEYS, WARPS, STAGES = (32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)
# Kernels whose tile holds a whole kv block: other keys would change what the tile is for.
WHOLE_KV_BLOCKS = ("past_fwd_short", "past_dkdv_dq")
# A tile must gain this share of the whole call to replace the present one.
GAIN = 0.01


def kernels_of(short: bool, fused: bool, screened: bool) -> Iterator[tuple[str, str]]:
    """(kernel, mode that shows it) of a call; `short`: kv blocks fit a forward tile, `fused`: and a backward one;
    `screened`: so many blocks that routing screens them."""
    yield "screen" if screened else "route", "fwd"
    yield "past_fwd_short" if short else "past_fwd_long", "fwd"
    yield "causal_fwd", "fwd"
    yield from [("past_dkdv_dq", "fwd+bwd")] if fused else [("past_dkdv", "fwd+bwd"), ("past_dq", "fwd+bwd")]
    yield "causal_dkdv", "fwd+bwd"
    yield "causal_dq", "fwd+bwd"


def place_of(choice: list[Tile], longest: int) -> int:
    """Which tile of a list a call takes: the first with enough keys, or else the last."""
    return next((i for i, tile in enumerate(choice) if tile[1] >= longest), len(choice) - 1)


def candidates(kernel: str, choice: list[Tile], place: int) -> Iterator[Tile]:
    """Other tiles to try in a place of a list; keys vary only in the last place of a kernel that streams them."""
    fixed = kernel in WHOLE_KV_BLOCKS or place < len(choice) - 1
    keys = (choice[place][1],) if fixed else KEYS
    for tile in itertools.product(ROWS, keys, WARPS, STAGES):
        if tile != choice[place]:
            yield tile


def improve(choice: list[Tile], place: int, tiles: Iterator[Tile], seconds: Callable[[], float | None]) -> float | None:
    """Put the fastest tile in a place of a list.

    Args:
        seconds: time with the list as it is; None where it cannot run.

    Returns:
        The share of the time that is gained; None if the present tile cannot run.
    """
    best = present = choice[place]
    before = seconds()
    if before is None:
        return None
    shortest = before
    for tile in tiles:
        choice[place] = tile
        now = seconds()
        if now is not None and now < shortest and now < before * (1 - GAIN):
            best, shortest = tile, now
    # The least of many times is partly luck: both once more.
    choice[place] = best
    now = seconds() if best != present else None
    choice[place] = present
    before = seconds() if now is not None else None
    if now is None or before is None or now >= before * (1 - GAIN):
        return 0.0
    choice[place] = best
    return 1 - now / before


def table_text(source: str, tiles: dict[int, Choices], fp32: Choices) -> str:
    """The text of a tile table with these tiles; what comes before its data is taken from `source`."""
    head, _, _ = source.partition("# fmt: off\n")
    row = "list[tuple[int, int, int, int]]"
    lines = [f"TILES: dict[int, dict[str, dict[tuple[int, int], {row}]]] = {{"]
    for architecture, choices in tiles.items():
        lines += [f"    {architecture}: {{", *_choices(choices, " " * 8), "    },"]
    lines += ["}", f"FP32_TILES: dict[str, dict[tuple[int, int], {row}]] = {{", *_choices(fp32, " " * 4), "}"]
    return "\n".join([f"{head}# fmt: off", *lines, "# fmt: on", ""])


def _choices(choices: Choices, indent: str) -> Iterator[str]:
    for kernel, sizes in choices.items():
        yield f'{indent}"{kernel}": {{'
        for size, tiles in sizes.items():
            yield f"{indent}    {size}: {tiles},"
        yield f"{indent}}},"


def run_tune(settings: BenchSettings, output: Path, console: Console) -> Path:
    """Tune for every dtype and block of the settings at their longest length; returns the written table's path.

    Raises:
        ValueError: without a CUDA device that the kernels run on, or for fp64.
    """
    if settings.device != "cuda":
        raise ValueError(f"bench: --tune needs a CUDA device, not {settings.device}")
    resolve_backend("triton", settings.device)
    from moba_megatron.ops.triton import config, tile_table

    architecture = config.table_of(config.architecture_of(torch.empty(0, device=settings.device)))
    output.mkdir(parents=True, exist_ok=True)
    path, tuned = output / "tile_table.py", set()
    for dtype in settings.dtypes:
        element = DTYPES[dtype]
        for block_size, top_k in settings.blocks:
            holds = (config.holds_kv_block(name, element, settings.head_size, block_size, architecture)
                     for name in WHOLE_KV_BLOCKS)  # fmt: skip
            past, blocks = top_k - 1, -(-max(settings.lengths) // block_size)
            needs = {"route": 0, "screen": config.screen_columns(past)}
            for kernel, mode in kernels_of(*holds, screens(blocks, past, element.itemsize)):
                choice = config.choices(kernel, element, settings.head_size, architecture)
                place = place_of(choice, needs.get(kernel, block_size))
                if (dtype, kernel, place) in tuned:
                    continue
                tuned.add((dtype, kernel, place))
                before = choice[place]
                gain = improve(
                    choice, place, candidates(kernel, choice, place), _timer(settings, dtype, block_size, top_k, mode)
                )
                result = "cannot run" if gain is None else f"{before} -> {choice[place]}, {gain:.1%} of {mode}"
                wrong = disagreement(settings, dtype, block_size, top_k) if choice[place] != before else None
                if wrong:
                    result, choice[place] = f"{before} stays: {choice[place]} gives wrong results, {wrong}", before
                console.print(f"{dtype} ({block_size}, {top_k}) {kernel}: {result}")
            path.write_text(
                table_text(
                    Path(tile_table.__file__).read_text(encoding="utf-8"), tile_table.TILES, tile_table.FP32_TILES
                ),
                encoding="utf-8",
            )
    console.print(f"  {path}: copy it to {tile_table.__file__} and run the compile tests")
    return path


def _timer(settings: BenchSettings, dtype: str, block_size: int, top_k: int, mode: str) -> Callable[[], float | None]:
    """Time of a call, None where its kernels do not compile or do not fit."""
    tensors = random_inputs(
        max(settings.lengths), settings.num_heads, settings.num_kv_heads, settings.head_size, dtype, settings.device,
        settings.seed,
    )  # fmt: skip
    call = call_of(
        lambda *x: moba_attention(*x, block_size=block_size, top_k=top_k, backend="triton"),
        tensors, torch.ones_like(tensors[0]), mode,
    )  # fmt: skip

    def seconds() -> float | None:
        try:
            call()  # compiles
            return median_seconds({"moba": call}, settings.runs, settings.device, settings.limit)["moba"]
        except kernel_errors():
            return None

    return seconds
