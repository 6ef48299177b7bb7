"""Past blocks, forward and backward: gathered query rows attend kv blocks whole.

The rows of a kv block's entries are gathered, attend all of its keys, and what they get lies in sorted order. Kv blocks
with few keys and few rows share tiles: one by one, calls would cost more than the products in them.

Padded entries compute what nobody reads; in the backward pass their log-sum-exp is infinite, so that their
probabilities are 0.

Legend: T query tokens, N query heads, S key rows of g kv heads, D head size, P entries with padding, b batches of a
tile with n rows against m keys each, U kv blocks of a tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moba_megatron.ops.gathered import tiles
from moba_megatron.ops.gathered.index import Index
from moba_megatron.ops.gathered.kv_heads import KVHeads
from moba_megatron.ops.gathered.row_sums import sums_of_rows

# Kv blocks share a tile where it would hold at least so many of them: with larger ones copying costs more than calls.
SMALL_KV_BLOCKS = 6


@dataclass(frozen=True)
class _Tile:
    """Entries first to last - 1 as b batches of n rows, each batch against m key rows.

    Attributes:
        shape: (b, n).
        keys: the m key rows that all batches share, or int64 [U, m], those of one kv block after the other.
        batches_U: int64 [U], batches of each of these kv blocks.
    """

    first: int
    last: int
    shape: tuple[int, int]
    keys: slice | Tensor
    batches_U: Tensor | None = None

    def of(self, entries: Tensor) -> Tensor:
        """[b, n, ...]: this tile's part of what belongs to the entries [P, ...]; a view."""
        return entries[self.first : self.last].unflatten(0, self.shape)

    def gather(self, source_TND: Tensor, index: Index) -> Tensor:
        """[b, n, D]: the entries' query rows."""
        return source_TND.flatten(0, 1).index_select(0, index.row_P[self.first : self.last]).unflatten(0, self.shape)

    def keys_of(self, source_gSD: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[b, m, D]: the key rows of each batch, in their own dtype or another."""
        source = source_gSD.flatten(0, 1)
        if isinstance(self.keys, slice):
            return source[self.keys].to(dtype or source.dtype).expand(self.shape[0], -1, -1)
        keys_bm = torch.repeat_interleave(self.keys, self.batches_U, dim=0, output_size=self.shape[0])
        return source.index_select(0, keys_bm.flatten()).to(dtype or source.dtype).unflatten(0, (self.shape[0], -1))

    def add_to_keys(self, total_gSD: Tensor, tile_bmD: Tensor) -> None:
        """Add to the tile's key rows, batch after batch."""
        total = total_gSD.flatten(0, 1)
        if isinstance(self.keys, slice):
            for batch in tile_bmD:
                total[self.keys] += batch
            return
        first_U = self.batches_U.cumsum(0) - self.batches_U
        total.index_add_(0, self.keys.flatten(), sums_of_rows(tile_bmD.to(total.dtype), first_U).flatten(0, 1))


def _past_tiles(kv: KVHeads, index: Index, fused: bool, batches: int) -> Iterator[_Tile]:
    """Tiles of kv blocks. One with much to compute has tiles of its own, cut into `batches` to run side by side.

    On a CPU adjacent equally long kv blocks with little share tiles; the large tiles of an accelerator would copy too
    many keys for that.
    """
    # The fused kernel keeps no scores and is at its best with longer tiles.
    budget = kv.scores_budget * (2 if fused else 1)
    for length, kv_blocks in itertools.groupby(index.kv_blocks, key=lambda kv_block: kv_block[1] - kv_block[0]):
        kv_blocks = list(kv_blocks)
        number, count = len(kv_blocks), kv_blocks[-1][3] - kv_blocks[0][2]
        if kv.k.device.type == "cpu" and number > 1 and SMALL_KV_BLOCKS * count * length < budget * number:
            yield from _shared_tiles(kv_blocks, index.rows, length, budget)
            continue
        unit = index.rows * batches
        step = max(unit, budget // length // unit * unit)
        for start, end, first, last in kv_blocks:
            for low in range(first, last, step):
                high = min(low + step, last)
                even = low + (high - low) // unit * unit
                if low < even:
                    yield _Tile(low, even, (batches, (even - low) // batches), slice(start, end))
                if even < high:
                    yield _Tile(even, high, (1, high - even), slice(start, end))


def _shared_tiles(kv_blocks: list[tuple[int, int, int, int]], rows: int, length: int, budget: int) -> Iterator[_Tile]:
    """Tiles of adjacent kv blocks of `length` keys, in batches of `rows` rows."""
    start_U, _, first_U, last_U = torch.tensor(kv_blocks).unbind(1)
    kv_block_b = torch.repeat_interleave((last_U - first_U) // rows)
    step = max(1, budget // (rows * length))
    for first in range(0, kv_block_b.numel(), step):
        kv_block_U, batches_U = kv_block_b[first : first + step].unique_consecutive(return_counts=True)
        keys_Um = start_U[kv_block_U].unsqueeze(1) + torch.arange(length)
        count = min(step, kv_block_b.numel() - first)
        low = kv_blocks[0][2] + first * rows
        yield _Tile(low, low + count * rows, (count, rows), keys_Um, batches_U)


def past_forward(kv: KVHeads, index: Index, partial_out_PD: Tensor, partial_lse_P: Tensor) -> None:
    """Write output and log-sum-exp of every entry, in sorted order; 0 and -inf for slots without a kv block."""
    partial_out_PD[index.count :] = 0
    partial_lse_P[index.count :] = -torch.inf
    fused = tiles.uses_fused_kernel(kv.q)
    for tile in _past_tiles(kv, index, fused, batches=1 if fused else kv.batches):
        out, lse = tile.of(partial_out_PD), tile.of(partial_lse_P)
        if fused:
            q = tile.gather(kv.q, index)
            tile_out, tile_lse = tiles.fused_forward(q, tile.keys_of(kv.k), tile.keys_of(kv.v), kv.scale)
        else:
            q = tile.gather(kv.q, index).to(kv.dtype).mul_(kv.scale)
            # Widened tile by tile: a wide copy of all keys may be more than everything else.
            tile_out, tile_lse = tiles.matmul_forward(q, tile.keys_of(kv.k, kv.dtype), tile.keys_of(kv.v, kv.dtype))
        out.copy_(tile_out)
        lse.copy_(tile_lse)


def past_backward(
    kv: KVHeads,
    index: Index,
    do_TND: Tensor,
    out_TND: Tensor | None,
    lse_TN: Tensor,
    delta_TN: Tensor,
    partial_dq_PD: Tensor,
    dk_gSD: Tensor,
    dv_gSD: Tensor,
) -> float:
    """Write dq of every entry, in sorted order, and add what the kv blocks get to dk and dv [g, S, D].

    Returns:
        The factor that dq still wants.
    """
    partial_dq_PD[index.count :] = 0
    lse_P, delta_P = (x.flatten().index_select(0, index.row_P) for x in (lse_TN, delta_TN))
    lse_P[index.padding] = torch.inf
    # The fused kernel makes delta from the output; without the output at hand, products do.
    fused = tiles.uses_fused_kernel(kv.q) and out_TND is not None
    for tile in _past_tiles(kv, index, fused, kv.batches):
        do, lse = tile.gather(do_TND, index), tile.of(lse_P)
        if fused:
            q, out = tile.gather(kv.q, index), tile.gather(out_TND, index)
            dq, dk, dv = tiles.fused_backward(do, q, tile.keys_of(kv.k), tile.keys_of(kv.v), out, lse, kv.scale)
        else:
            q = tile.gather(kv.q, index).to(kv.dtype).mul_(kv.scale)
            k, v = tile.keys_of(kv.k_wide), tile.keys_of(kv.v_wide)
            dq, dk, dv = tiles.matmul_backward(do.to(kv.dtype), q, k, v, lse, tile.of(delta_P))
        tile.of(partial_dq_PD).copy_(dq)
        tile.add_to_keys(dk_gSD, dk)
        tile.add_to_keys(dv_gSD, dv)
    return 1.0 if fused else kv.scale
