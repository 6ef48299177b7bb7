"""Launch settings of the kernels: tile shapes, warps and pipeline stages for an element size, a head size and an
architecture.

The shapes of `tile_table` are those with which no kernel spills registers and shared memory fits the chip (both read
from the compiled code, see `catalog`). Settings depend on nothing but these sizes: the same inputs meet the same tiles
in the forward pass and its recomputation.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moba_megatron.ops.kernel_sizes import PLANES, SPLIT_ENTRIES, SPLIT_ENTRIES_PER_KEY
from moba_megatron.ops.triton.common import PER_AXIS
from moba_megatron.ops.triton.tile_table import FP32_TILES, TILES

SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_SIZES = (64, 96, 128, 192, 256)
# What the interpreter takes.
DEFAULT_ARCHITECTURE = 90

# Kernels bound by memory alone: (elements of a tile [rows, width], what its rows are, warps).
STREAMING = {
    "block_means": (4096, "BLOCK_N", 4),
    "add_pieces": (4096, "BLOCK_N", 16),
    "attend_cached": (4096, "BLOCK_N", 8),
    "merge_rows": (2048, "BLOCK_M", 2),
    "add_dq": (4096, "BLOCK_M", 8),
    "output_delta_rows": (4096, "BLOCK_M", 4),
}
# Warps where a head has more than 128 columns, if not as above: with as few there, or as many here, registers spill.
WIDE_WARPS = {"merge_rows": 4}
# Members of a tile, warps.
INDEX_TILES = {"count_entries": (1024, 4), "scatter_entries": (64, 4)}

# Decoding: programs that score blocks, about two for each multiprocessor of a large chip, and the least blocks for one.
DECODING_PROGRAMS, LEAST_PART = 256, 256
# Programs that build an index, at most: each counts for itself, so that this bounds the counts in memory.
MOST_CHUNKS = 1024


class Tile(NamedTuple):
    """Query rows and keys of a tile, warps of a program, stages of its pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def checked(tensor: Tensor) -> Tensor:
    """A tensor whose rows the kernels can read: its last dimension contiguous.

    Raises:
        ValueError: a dtype or head size without kernels.
    """
    if tensor.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"the triton backend takes bfloat16, float16 and float32, not {tensor.dtype}: cast, or use "
            "backend='gathered'"
        )
    if tensor.shape[-1] > HEAD_SIZES[-1]:
        raise ValueError(
            f"the triton backend takes head sizes up to {HEAD_SIZES[-1]}, not {tensor.shape[-1]}: use "
            "backend='gathered'"
        )
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def width_of(head_size: int) -> int:
    """Columns of a tile that holds a head.

    >>> width_of(96), width_of(8)
    (128, 16)
    """
    return max(16, triton.next_power_of_2(head_size))


def table_of(architecture: int) -> int:
    """The architecture of the table whose tiles run on one that may not be in it.

    Chips with the shared memory of sm_90 and its kin take the nearest of these; all others the frugal tiles of sm_80.

    >>> table_of(103), table_of(89), table_of(120)
    (100, 80, 80)
    """
    return architecture // 10 * 10 if architecture // 10 in (9, 10) else 80


def choices(kernel: str, dtype: torch.dtype, head_size: int, architecture: int) -> list[tuple[int, int, int, int]]:
    """The list of tiles in the table that a kernel chooses from: the chip's own, or else that of all chips (fp32)."""
    key = dtype.itemsize, next(size for size in HEAD_SIZES if size >= head_size)
    own = TILES[table_of(architecture)][kernel]
    return own[key] if key in own else FP32_TILES[kernel][key]


def _tile(kernel: str, dtype: torch.dtype, head_size: int, architecture: int, longest: int) -> Tile:
    choice = choices(kernel, dtype, head_size, architecture)
    return Tile(*next((tile for tile in choice if tile[1] >= longest), choice[-1]))


def tiles(
    kernel: str,
    dtype: torch.dtype | None = None,
    head_size: int = 0,
    longest: int = 0,
    architecture: int = DEFAULT_ARCHITECTURE,
) -> dict[str, int]:
    """Launch settings of a kernel: its sizes known at compile time, `num_warps` and `num_stages`.

    Args:
        dtype, head_size: of the inputs; for kernels that read rows.
        longest: keys of the longest unit or triangle; no tile has more keys than it needs.
    """
    if kernel in INDEX_TILES:
        members, warps = INDEX_TILES[kernel]
        # One stage: a tile's loads may not run ahead of the stores of the one before.
        return {"BLOCK_E": members, "num_warps": warps, "num_stages": 1}
    assert dtype is not None
    width = width_of(head_size)
    settings = {"HEAD_SIZE": head_size, "WIDTH": width}
    if kernel in STREAMING:
        elements, side, warps = STREAMING[kernel]
        warps = WIDE_WARPS.get(kernel, warps) if width > 128 else warps
        return settings | {side: max(16, elements // width), "num_warps": warps}
    tile = _tile(kernel, dtype, head_size, architecture, longest)
    keys = min(tile.keys, max(16, triton.next_power_of_2(longest)))
    return settings | {"BLOCK_M": tile.rows, "BLOCK_N": keys, "num_warps": tile.warps, "num_stages": tile.stages}


def route_tiles(
    dtype: torch.dtype,
    head_size: int,
    num_past: int,
    rows: int | None = None,
    architecture: int = DEFAULT_ARCHITECTURE,
) -> dict[str, int]:
    """Launch settings of routing, for K = `num_past` blocks to keep and, in decoding, only so many rows in a tile."""
    tile = _tile("select_blocks", dtype, head_size, architecture, 0)
    if rows is not None:
        # Few rows, in fp32, on any chip.
        tile = Tile(max(16, triton.next_power_of_2(rows)), 64, max(4, width_of(head_size) // 32), 1)
    return {
        "HEAD_SIZE": head_size,
        "WIDTH": width_of(head_size),
        "PLANES": 1 if dtype == torch.float32 else PLANES,
        "KEEP": triton.next_power_of_2(num_past),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def holds_unit(
    kernel: str, dtype: torch.dtype, head_size: int, longest: int, architecture: int = DEFAULT_ARCHITECTURE
) -> bool:
    """Whether a kernel that takes whole units (`attend_short_units`, `units_dkdv_dq`) takes units of `longest` keys."""
    return longest <= _tile(kernel, dtype, head_size, architecture, longest).keys


def tiles_for(kernel: str, tensor: Tensor, longest: int = 0) -> dict[str, int]:
    """`tiles` for a tensor of the inputs, [.., D], on the device where it lies."""
    return tiles(kernel, tensor.dtype, tensor.shape[-1], longest, architecture_of(tensor))


def holds_unit_for(kernel: str, tensor: Tensor, longest: int) -> bool:
    """`holds_unit` for a tensor of the inputs, [.., D], on the device where it lies."""
    return holds_unit(kernel, tensor.dtype, tensor.shape[-1], longest, architecture_of(tensor))


def piece_size(kernel: str, settings: dict[str, int], longest: int = 0) -> int:
    """Members of a piece of a list, for the launch settings of `tiles`."""
    if kernel == "attend_short_units":
        return SPLIT_ENTRIES
    if kernel in ("units_dkdv", "units_dkdv_dq"):
        return max(SPLIT_ENTRIES, SPLIT_ENTRIES_PER_KEY * triton.next_power_of_2(longest))
    return settings["BLOCK_M"]


def spread(count: int) -> tuple[int, int]:
    """Second and third axis of a launch that together count `count` programs, and perhaps surplus ones.

    >>> spread(100), spread(70_000)
    ((100, 1), (32768, 3))
    """
    each = min(count, PER_AXIS.value)
    return each, -(-count // each)


def chunks(entries: int, groups: int) -> tuple[int, int]:
    """(chunks, entries per chunk) for the index of `groups` key heads with so many entries each.

    >>> chunks(5000, 2)
    (5, 1024)
    """
    size = INDEX_TILES["count_entries"][0]
    most = max(1, MOST_CHUNKS // groups)
    per_chunk = size * max(1, -(-entries // (size * most)))
    return max(1, -(-entries // per_chunk)), per_chunk


def decoding_parts(programs: int, blocks: int) -> tuple[int, int]:
    """(parts, blocks of a part) into which decoding cuts the blocks of a cache, for so many sequences and key heads.

    >>> decoding_parts(8, 8192), decoding_parts(1024, 8192), decoding_parts(1, 300)
    ((32, 256), (1, 8192), (2, 150))
    """
    parts = max(1, min(DECODING_PROGRAMS // programs, -(-blocks // LEAST_PART)))
    part_blocks = -(-blocks // parts)
    return -(-blocks // part_blocks), part_blocks


def architecture_of(tensor: Tensor) -> int:
    """Compute capability of a tensor's device as one number: 90 for 9.0, and for the interpreter."""
    return _architecture(tensor.device.index) if tensor.is_cuda else DEFAULT_ARCHITECTURE


@functools.cache
def _architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
