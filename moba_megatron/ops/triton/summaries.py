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
from moba_megatron.ops.triton.common import COUNTS, load_kv, load_rows, row_norms, store_rows
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


@triton.jit(do_not_specialize=COUNTS)
def split_means(
    means_ptr,
    planes_ptr,
    num_rows,
    plane_step,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per `BLOCK_N` of the (block, kv head) rows: their planes, one after the other."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n, offset = offs_n < num_rows, offs_n.to(tl.int64) * HEAD_DIM
    rest = load_rows(means_ptr, offset, mask_n, HEAD_DIM, BLOCK_D)
    for plane in tl.static_range(PLANES):
        part = rest.to(planes_ptr.dtype.element_ty)
        store_rows(planes_ptr, offset + plane * num_rows.to(tl.int64) * HEAD_DIM, mask_n, part, HEAD_DIM, BLOCK_D)
        rest = (rest - part.to(tl.float32)) * plane_step


@torch.no_grad()
@on_its_device
def planes_of(means_MGD: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Planes [P, M, G, D] in the queries' dtype, and by how much each is enlarged against the one before.

    >>> planes, step = planes_of(torch.tensor([[[1 / 3]]]), torch.bfloat16)
    >>> first, second, third = planes.double().flatten().tolist()
    >>> abs(first + (second + third / step) / step - float(torch.tensor(1 / 3))) < 1e-9
    True
    """
    if dtype == torch.float32:
        return means_MGD.unsqueeze(0), 1.0
    means, step = means_MGD.contiguous(), PLANE_STEP[dtype]
    planes = torch.empty(PLANES, *means.shape, dtype=dtype, device=means.device)
    rows, tiles = planes[0].numel() // means.shape[2], config.tiles_for("split_means", means)
    split_means[(triton.cdiv(rows, tiles["BLOCK_N"]),)](means, planes, rows, step, PLANES=PLANES, **tiles)
    return planes, step


@triton.jit(do_not_specialize=COUNTS)
def average_means(
    means_ptr,
    average_ptr,
    num_blocks,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per kv head: the average of its means. Means that are not finite, and those of unused numbers, which
    are zero, do not count."""
    kv_head, num_kv_heads = tl.program_id(0), tl.num_programs(0)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    count = tl.zeros([1], dtype=tl.float32)
    for first in range(0, num_blocks, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        offset = (offs_n.to(tl.int64) * num_kv_heads + kv_head) * HEAD_DIM
        mean = load_rows(means_ptr, offset, offs_n < num_blocks, HEAD_DIM, BLOCK_D)
        size = tl.sum(tl.abs(mean), axis=1)
        counts = (size > 0) & (size < float("inf"))
        total += tl.sum(tl.where(counts[:, None], mean, 0.0), axis=0)
        count += tl.sum(counts.to(tl.float32), axis=0)
    average = total / tl.maximum(count, 1.0)
    average = tl.where(tl.abs(average) < float("inf"), average, 0.0)
    offs_d = tl.arange(0, BLOCK_D)
    tl.store(average_ptr + kv_head * HEAD_DIM + offs_d, average, mask=offs_d < HEAD_DIM)


@triton.jit(do_not_specialize=COUNTS)
def centre_means(
    means_ptr,
    average_ptr,
    centred_ptr,
    bounds_ptr,
    num_rows,
    num_kv_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per `BLOCK_N` of the (block, kv head) rows: their plane and bound, see `centred_plane`."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n, offset = offs_n < num_rows, offs_n.to(tl.int64) * HEAD_DIM
    mean = load_rows(means_ptr, offset, mask_n, HEAD_DIM, BLOCK_D)
    average = load_rows(average_ptr, (offs_n % num_kv_heads).to(tl.int64) * HEAD_DIM, mask_n, HEAD_DIM, BLOCK_D)
    finite = tl.sum(mean * 0.0, axis=1) == 0.0
    centred = tl.where(finite[:, None], mean - average, 0.0)
    largest = 65504.0 if centred_ptr.dtype.element_ty == tl.float16 else 2.0**50
    plane = tl.minimum(tl.maximum(centred, -largest), largest).to(centred_ptr.dtype.element_ty)
    store_rows(centred_ptr, offset, mask_n, plane, HEAD_DIM, BLOCK_D)
    rounded = plane.to(tl.float32)
    bound = row_norms(centred - rounded) + (HEAD_DIM + 4) * 2.0**-22 * row_norms(rounded)
    bound = tl.where(finite, bound * (1 + 2.0**-9) + 2.0**-50, float("nan"))
    tl.store(bounds_ptr + offs_n, bound, mask=mask_n)


def centred_plane(means_MGD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One plane [M, G, D], in the queries' 16-bit dtype, of contiguous fp32 means less their average per kv head; and
    fp32 [M, G]: by how much the product of a query of norm 1 with it may differ from that with the centred mean, which
    `screening` derives. NaN for a mean that is not finite. No element of the plane is above 2^50, no bound below 2^-50.
    """
    blocks, kv_heads, size = means_MGD.shape
    average = torch.empty(kv_heads, size, dtype=torch.float32, device=means_MGD.device)
    centred = torch.empty(means_MGD.shape, dtype=dtype, device=means_MGD.device)
    bounds = torch.empty(blocks, kv_heads, dtype=torch.float32, device=means_MGD.device)
    average_means[(kv_heads,)](means_MGD, average, blocks, **config.tiles_for("average_means", means_MGD))
    tiles = config.tiles_for("centre_means", means_MGD)
    centre_means[(triton.cdiv(blocks * kv_heads, tiles["BLOCK_N"]),)](
        means_MGD, average, centred, bounds, blocks * kv_heads, kv_heads, **tiles
    )
    return centred, bounds
