"""Block summaries: the mean of each block's keys in fp32, and its split into planes that 16-bit queries can be
multiplied with.

The mean of bf16 keys has up to 24 significant bits, a bf16 number 8: the mean is written as a sum of three planes in
the queries' dtype, each the rounded rest of the one before, enlarged by a power of two so that it never becomes a
subnormal. Three products with fp32 sums then score as exactly as one in fp32, on the matrix units.

Traffic: keys once, T G D elements; means M G D fp32.

Legend: T tokens, G key heads, D head size, M blocks, B tokens per block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_megatron.ops.kernel_sizes import PLANES
from moba_megatron.ops.layout import BlockLayout
from moba_megatron.ops.triton import config
from moba_megatron.ops.triton.common import load_rows
from moba_megatron.ops.triton.devices import on_its_device

# A plane's rest is at most half a unit in the last place, so that enlarged by this it is of the plane's size again.
PLANE_STEP = {torch.bfloat16: 2.0**8, torch.float16: 2.0**11}


@triton.jit
def block_means(
    k,
    start,
    end,
    means,
    k_row,
    k_head,
    HEAD_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (block, key head): rows are added tile by tile, in order; zero for an empty block."""
    block, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = tl.load(start + block)
    length = (tl.load(end + block) - first).to(tl.int32)
    base = k + first * k_row + group.to(tl.int64) * k_head
    total = tl.zeros([WIDTH], dtype=tl.float32)
    for low in range(0, length, BLOCK_N):
        row = low + tl.arange(0, BLOCK_N)
        tile = load_rows(base, row.to(tl.int64) * k_row, row < length, HEAD_SIZE, WIDTH)
        total += tl.sum(tile.to(tl.float32), axis=0)
    mean = total / tl.maximum(length, 1).to(tl.float32)
    column = tl.arange(0, WIDTH)
    at = (block * tl.num_programs(1) + group) * HEAD_SIZE + column
    tl.store(means + at, mean, mask=column < HEAD_SIZE)


def summarize(k_TGD: Tensor, layout: BlockLayout) -> Tensor:
    """Means [M, G, D] in fp32 of all blocks of a pack; zero for the unused numbers of an upper bound.

    Raises:
        ValueError: fp64 keys, which only the portable backends sum in fp64.
    """
    return mean_rows(k_TGD, layout.block_starts(), layout.block_ends())


@torch.no_grad()
@on_its_device
def mean_rows(k_TGD: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """fp32 means [M, G, D] of the stretches of rows from int64 `starts` [M] to `ends`; zero for empty ones."""
    k = config.checked(k_TGD)
    groups, size = k.shape[1:]
    means = torch.empty(starts.numel(), groups, size, dtype=torch.float32, device=k.device)
    if means.numel():
        block_means[(starts.numel(), groups)](
            k, starts, ends, means, k.stride(0), k.stride(1), **config.tiles_for("block_means", k)
        )
    return means


def planes_of(means_MGD: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Planes [P, M, G, D] in the queries' dtype, and by how much each is enlarged against the one before.

    >>> planes, step = planes_of(torch.tensor([[[1 / 3]]]), torch.bfloat16)
    >>> first, second, third = planes.double().flatten().tolist()
    >>> abs(first + (second + third / step) / step - float(torch.tensor(1 / 3))) < 1e-9
    True
    """
    if dtype == torch.float32:
        return means_MGD.unsqueeze(0), 1.0
    step, rest, planes = PLANE_STEP[dtype], means_MGD, []
    for _ in range(PLANES):
        planes.append(rest.to(dtype))
        rest = (rest - planes[-1].float()) * step
    return torch.stack(planes), step
