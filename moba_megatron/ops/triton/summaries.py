"""Block summaries: the mean of each block's keys in fp32, and its split into planes that 16-bit queries can be
multiplied with.

The mean of bf16 keys has up to 24 significant bits, a bf16 number 8: the mean is written as a sum of three planes in
the queries' dtype, each the rounded rest of the one before, enlarged by a power of two so that it never becomes a
subnormal. Three products with fp32 sums then score as exactly as one in fp32, on the matrix units.

Traffic: keys once, T G D elements; means M G D fp32.

Legend: T tokens, G kv heads, D head size, M blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moba_megatron.ops.kernel_sizes import PLANES
from moba_megatron.ops.layout import BlockLayout
from moba_megatron.ops.triton import config
from moba_megatron.ops.triton.common import load_kv
from moba_megatron.ops.triton.devices import on_its_device

# A plane's rest is at most half a unit in the last place, so that enlarged by this it is of the plane's size again.
PLANE_STEP = {torch.bfloat16: 2.0**8, torch.float16: 2.0**11}


@triton.jit
def block_means(
    k_ptr,
    block_start_ptr,
    block_end_ptr,
    means_ptr,
    stride_kn,
    stride_kh,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per (block, kv head): rows are added tile by tile, in order; zero for an empty block."""
    block, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = tl.load(block_start_ptr + block)
    length = (tl.load(block_end_ptr + block) - start).to(tl.int32)
    base_ptr = k_ptr + start * stride_kn + kv_head.to(tl.int64) * stride_kh
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for first in range(0, length, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        k = load_kv(base_ptr, offs_n, stride_kn, length, HEAD_DIM, BLOCK_D)
        total += tl.sum(k.to(tl.float32), axis=0)
    mean = total / tl.maximum(length, 1).to(tl.float32)
    offs_d = tl.arange(0, BLOCK_D)
    target = (block * tl.num_programs(1) + kv_head) * HEAD_DIM + offs_d
    tl.store(means_ptr + target, mean, mask=offs_d < HEAD_DIM)


def summarize(k_TGD: Tensor, layout: BlockLayout) -> Tensor:
    """Means [M, G, D] in fp32 of all blocks of a pack; zero for the unused numbers of an upper bound.

    Raises:
        ValueError: fp64 keys, which only the portable backends sum in fp64.
    """
    return mean_rows(k_TGD, layout.block_starts(), layout.block_ends())


@torch.no_grad()
@on_its_device
def mean_rows(k_TGD: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """fp32 means [M, G, D] of the spans of rows from int64 `starts` [M] to `ends`; zero for empty ones."""
    k = config.checked(k_TGD)
    kv_heads, size = k.shape[1:]
    means = torch.empty(starts.numel(), kv_heads, size, dtype=torch.float32, device=k.device)
    if means.numel():
        block_means[(starts.numel(), kv_heads)](
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
