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

from moba_megatron.ops.kernel_sizes import PLANES, SPLIT_ENTRIES, SPLIT_ENTRIES_PER_KEY, power_of_two
from moba_megatron.ops.triton.common import PER_AXIS
from moba_megatron.ops.triton.tile_table import FP32_TILES, TILES

SUPPORTED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_SIZES = (64, 96, 128, 192, 256)
# What the interpreter takes.
DEFAULT_ARCHITECTURE = 90

# Kernels bound by memory alone: (elements of a tile [rows, BLOCK_D], what its rows are, warps).
STREAMING = {
    "block_means": (4096, "BLOCK_N", 4),
    "split_means": (4096, "BLOCK_N", 4),
    "average_means": (8192, "BLOCK_N", 8),
    "centre_means": (4096, "BLOCK_N", 8),
    "add_groups": (4096, "BLOCK_N", 8),
    "combine_dkdv": (4096, "BLOCK_N", 16),
    "decode_fwd": (4096, "BLOCK_N", 8),
    "combine_out": (2048, "BLOCK_M", 2),
    "combine_dq": (4096, "BLOCK_M", 8),
    "output_delta_rows": (4096, "BLOCK_M", 4),
}
# Warps where a tile has more than 128 channels, if not as above: with as few there, or as many here, registers spill.
WIDE_WARPS = {"combine_out": 4}
# Kernels that make an index: entries (E), head blocks or spans (L), chunks (C) and splits (S) of a tile, warps.
INDEX_TILES = {
    "count_entries": {"BLOCK_E": 1024, "num_warps": 8},
    "rank_chunks": {"BLOCK_C": 32, "BLOCK_L": 32, "num_warps": 4},
    "split_entries": {"BLOCK_E": 1024, "BLOCK_L": 32, "BLOCK_S": 128, "num_warps": 4},
    "split_spans": {"BLOCK_E": 1024, "BLOCK_L": 32, "BLOCK_S": 128, "num_warps": 4},
    "scatter_entries": {"BLOCK_E": 64, "num_warps": 4},
}

# Channels that screening scores at once from the means in fp32.
SCORED_CHANNELS = 64

# Decoding: programs that score blocks, about two for each multiprocessor of a large chip, and the least blocks for one.
DECODING_PROGRAMS, LEAST_SPLIT = 256, 256
# Splits whose sums one program adds one after the other.
ADD_AT_ONCE = 64
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


def block_d_of(head_size: int) -> int:
    """Channels of a tile that holds a head: the constant `BLOCK_D`.

    >>> block_d_of(96), block_d_of(8)
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
        longest: keys of the longest kv block or causal span; no tile has more keys than it needs.
    """
    if kernel in INDEX_TILES:
        # One stage: a tile's loads may not run ahead of the stores of the one before.
        return INDEX_TILES[kernel] | {"num_stages": 1}
    assert dtype is not None
    block_d = block_d_of(head_size)
    settings = {"HEAD_DIM": head_size, "BLOCK_D": block_d}
    if kernel in STREAMING:
        elements, side, warps = STREAMING[kernel]
        warps = WIDE_WARPS.get(kernel, warps) if block_d > 128 else warps
        return settings | {side: max(16, elements // block_d), "num_warps": warps}
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
    tile = _tile("route", dtype, head_size, architecture, 0)
    if rows is not None:
        # Few rows, in fp32, on any chip.
        tile = Tile(max(16, triton.next_power_of_2(rows)), 64, max(4, block_d_of(head_size) // 32), 1)
    return {
        "HEAD_DIM": head_size,
        "BLOCK_D": block_d_of(head_size),
        "PLANES": 1 if dtype == torch.float32 else PLANES,
        "KEEP": triton.next_power_of_2(num_past),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def screen_columns(num_past: int) -> int:
    """Columns of a tile that screening wants at least, to choose K = `num_past` blocks: 4 K."""
    return 4 * power_of_two(max(1, num_past))


def screen_tiles(
    dtype: torch.dtype, head_size: int, num_past: int, architecture: int = DEFAULT_ARCHITECTURE
) -> dict[str, int]:
    """Launch settings of screening, for K = `num_past` blocks to choose: lists have room for 2 K."""
    columns = screen_columns(num_past)
    tile = _tile("screen", dtype, head_size, architecture, columns)
    block_d = block_d_of(head_size)
    return {
        "HEAD_DIM": head_size,
        "BLOCK_D": block_d,
        "CHUNK_D": min(block_d, SCORED_CHANNELS),
        "KEEP": columns // 2,
        "BLOCK_M": tile.rows,
        "BLOCK_N": max(tile.keys, columns),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def gather_tiles(num_past: int) -> dict[str, int]:
    """Launch settings of `gather_entries`, for K = `num_past` ids of a row."""
    keep = triton.next_power_of_2(num_past)
    return INDEX_TILES["count_entries"] | {"KEEP": keep, "BLOCK_M": max(16, 1024 // keep), "num_stages": 1}


def holds_kv_block(
    kernel: str, dtype: torch.dtype, head_size: int, longest: int, architecture: int = DEFAULT_ARCHITECTURE
) -> bool:
    """Whether a kernel that holds whole kv blocks (`past_fwd_short`, `past_dkdv_dq`) holds one of `longest` keys."""
    return longest <= _tile(kernel, dtype, head_size, architecture, longest).keys


def tiles_for(kernel: str, tensor: Tensor, longest: int = 0) -> dict[str, int]:
    """`tiles` for a tensor of the inputs, [.., D], on the device where it lies."""
    return tiles(kernel, tensor.dtype, tensor.shape[-1], longest, architecture_of(tensor))


def holds_kv_block_for(kernel: str, tensor: Tensor, longest: int) -> bool:
    """`holds_kv_block` for a tensor of the inputs, [.., D], on the device where it lies."""
    return holds_kv_block(kernel, tensor.dtype, tensor.shape[-1], longest, architecture_of(tensor))


def split_size(kernel: str, settings: dict[str, int], longest: int = 0) -> int:
    """Entries of a split, for the launch settings of `tiles`."""
    if kernel == "past_fwd_short":
        return SPLIT_ENTRIES
    if kernel in ("past_dkdv", "past_dkdv_dq"):
        return max(SPLIT_ENTRIES, SPLIT_ENTRIES_PER_KEY * triton.next_power_of_2(longest))
    return settings["BLOCK_M"]


def spread(count: int) -> tuple[int, int]:
    """Second and third axis of a launch that together count `count` programs, and perhaps surplus ones.

    >>> spread(100), spread(70_000)
    ((100, 1), (32768, 3))
    """
    each = min(count, PER_AXIS.value)
    return each, -(-count // each)


def chunks(entries: int, kv_heads: int) -> tuple[int, int]:
    """(chunks, entries per chunk) for the index of `kv_heads` kv heads with so many entries each.

    >>> chunks(5000, 2)
    (5, 1024)
    """
    size = INDEX_TILES["count_entries"]["BLOCK_E"]
    most = max(1, MOST_CHUNKS // kv_heads)
    per_chunk = size * max(1, -(-entries // (size * most)))
    return max(1, -(-entries // per_chunk)), per_chunk


def decode_splits(programs: int, blocks: int) -> tuple[int, int]:
    """(splits, blocks of a split) into which decoding cuts the blocks of a cache, for so many sequences and kv heads.

    >>> decode_splits(8, 8192), decode_splits(1024, 8192), decode_splits(1, 300)
    ((32, 256), (1, 8192), (2, 150))
    """
    splits = max(1, min(DECODING_PROGRAMS // programs, -(-blocks // LEAST_SPLIT)))
    size = -(-blocks // splits)
    return -(-blocks // size), size


def architecture_of(tensor: Tensor) -> int:
    """Compute capability of a tensor's device as one number: 90 for 9.0, and for the interpreter."""
    return _architecture(tensor.device.index) if tensor.is_cuda else DEFAULT_ARCHITECTURE


@functools.cache
def _architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
