"""Past blocks, forward and backward: gathered query rows attend kv blocks whole.

The rows of a kv block's entries are gathered, attend all of its keys, and what they get lies in sorted order. Kv blocks
with few keys and few rows share tiles: one by one, calls would cost more than the products in them.

Legend: T query tokens, N query heads, S key rows, D head size, E entries, b batches of a tile with n rows against m
keys each, U kv blocks that share tiles.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moba_megatron.ops.gathered import tiles
from moba_megatron.ops.gathered.index import Index
from moba_megatron.ops.gathered.kv_heads import KVHead

# Query rows of a batch where short kv blocks share a tile: fewer leave less room unused, more make products longer.
ROWS_OF_BATCH = 64
# Kv blocks share a tile where it would hold at least so many of them: with larger ones copying costs more than calls.
SMALL_KV_BLOCKS = 16


@dataclass(frozen=True)
class _Tile:
    """Entries first to last - 1 as b batches of n rows, each batch against m key rows.

    Attributes:
        shape: (b, n).
        place_E: int64 [last - first], where each entry lies among the b * n rows; None where they lie in order, with
            room left at the end.
        keys: the m key rows that all batches share, or int64 [b * m], those of one batch after the other.
    """

    first: int
    last: int
    shape: tuple[int, int]
    place_E: Tensor | None
    keys: slice | Tensor

    def gather(self, source: Tensor, row_E: Tensor) -> Tensor:
        """[b, n, ...]: the entries' query rows of a [T, N, ...], filled up with zeros."""
        tile = source.new_empty(self.shape[0] * self.shape[1], *source.shape[2:])
        source, rows = source.flatten(0, 1), row_E[self.first : self.last]
        if self.place_E is None:
            torch.index_select(source, 0, rows, out=tile[: rows.numel()])
            tile[rows.numel() :] = 0
        else:
            tile.zero_().index_copy_(0, self.place_E, source.index_select(0, rows))
        return tile.unflatten(0, self.shape)

    def entries_of(self, tile: Tensor) -> Tensor:
        """[last - first, ...]: what a [b, n, ...] holds of the entries, in their order."""
        rows = tile.flatten(0, 1)
        return rows[: self.last - self.first] if self.place_E is None else rows.index_select(0, self.place_E)

    def keys_of(self, source: Tensor) -> Tensor:
        """[b, m, D]: key rows of an [S, D]."""
        if isinstance(self.keys, slice):
            return source[self.keys].expand(self.shape[0], -1, -1)
        return source.index_select(0, self.keys).unflatten(0, (self.shape[0], -1))

    def add_to_keys(self, total_SD: Tensor, tile: Tensor) -> None:
        """Add a [b, m, D] to the tile's key rows of an [S, D], batch after batch."""
        if isinstance(self.keys, slice):
            for batch in tile:
                total_SD[self.keys] += batch
        else:
            total_SD.index_add_(0, self.keys, tile.flatten(0, 1).to(total_SD.dtype))


def _past_tiles(kv: KVHead, index: Index, fused: bool, batches: int) -> Iterator[_Tile]:
    """Tiles of kv blocks. One with much to compute has tiles of its own, cut into `batches` to run side by side.

    On a CPU adjacent equally long kv blocks with little are cut into batches of equal size and share tiles; the large
    tiles of an accelerator would copy too many keys for that.
    """
    # The fused kernel keeps no scores and is at its best with longer tiles.
    budget = kv.scores_budget * (2 if fused else 1)
    for length, kv_blocks in itertools.groupby(index.kv_blocks, key=lambda kv_block: kv_block[1] - kv_block[0]):
        kv_blocks = list(kv_blocks)
        number, count = len(kv_blocks), kv_blocks[-1][3] - kv_blocks[0][2]
        if kv.q.device.type == "cpu" and number > 1 and SMALL_KV_BLOCKS * count * length < budget * number:
            yield from _shared_tiles(kv_blocks, length, budget)
            continue
        rows = max(64, budget // length)
        for start, end, first, last in kv_blocks:
            for low in range(first, last, rows):
                high = min(low + rows, last)
                yield _Tile(low, high, (batches, -(-(high - low) // batches)), None, slice(start, end))


def _shared_tiles(kv_blocks: list[tuple[int, int, int, int]], length: int, budget: int) -> Iterator[_Tile]:
    """Tiles of adjacent kv blocks of `length` keys, in batches of ROWS_OF_BATCH rows."""
    start_U, _, first_U, last_U = torch.tensor(kv_blocks).unbind(1)
    batches_U = -((first_U - last_U) // ROWS_OF_BATCH)
    kv_block_b = torch.repeat_interleave(batches_U)
    number_b = torch.arange(kv_block_b.numel())
    first_b = first_U[kv_block_b] + (number_b - (batches_U.cumsum(0) - batches_U)[kv_block_b]) * ROWS_OF_BATCH
    last_b = torch.minimum(first_b + ROWS_OF_BATCH, last_U[kv_block_b])
    step = max(1, budget // (ROWS_OF_BATCH * length))
    lows = [*first_b[::step].tolist(), kv_blocks[-1][3]]
    for number, (low, high) in enumerate(itertools.pairwise(lows)):
        batches = slice(number * step, (number + 1) * step)
        first, rows = first_b[batches], (last_b - first_b)[batches]
        shift = number_b[: first.numel()] * ROWS_OF_BATCH - first
        place = torch.arange(low, high) + torch.repeat_interleave(shift, rows)
        keys = start_U[kv_block_b[batches]].unsqueeze(1) + torch.arange(length)
        yield _Tile(low, high, (first.numel(), ROWS_OF_BATCH), place, keys.flatten())


def past_forward(kv: KVHead, index: Index, partial_out_ED: Tensor, partial_lse_E: Tensor) -> None:
    """Write output and log-sum-exp of every entry, in sorted order; 0 and -inf for slots without a kv block."""
    partial_out_ED[index.count :] = 0
    partial_lse_E[index.count :] = -torch.inf
    fused = tiles.uses_fused_kernel(kv.q)
    for tile in _past_tiles(kv, index, fused, batches=1 if fused else kv.batches):
        inputs = (tile.gather(kv.q, index.row_E), tile.keys_of(kv.k), tile.keys_of(kv.v))
        if fused:
            out, lse = tiles.fused_forward(*inputs, kv.scale)
        else:
            out, lse = tiles.matmul_forward(*(x.to(kv.dtype) for x in inputs), kv.scale)
        partial_out_ED[tile.first : tile.last] = tile.entries_of(out)
        partial_lse_E[tile.first : tile.last] = tile.entries_of(lse)


def past_backward(
    kv: KVHead,
    index: Index,
    do_TND: Tensor,
    out_TND: Tensor | None,
    lse_TN: Tensor,
    delta_TN: Tensor,
    partial_dq_ED: Tensor,
    dk_SD: Tensor,
    dv_SD: Tensor,
) -> None:
    """Write dq of every entry, in sorted order, and add what the kv blocks get to dk and dv [S, D]."""
    partial_dq_ED[index.count :] = 0
    # The fused kernel makes delta from the output; without the output at hand, products do.
    fused = tiles.uses_fused_kernel(kv.q) and out_TND is not None
    for tile in _past_tiles(kv, index, fused, kv.batches):
        rows = index.row_E
        q, do, lse = (tile.gather(x, rows) for x in (kv.q, do_TND, lse_TN))
        k, v = tile.keys_of(kv.k), tile.keys_of(kv.v)
        if fused:
            dq, dk, dv = tiles.fused_backward(do, q, k, v, tile.gather(out_TND, rows), lse, kv.scale)
        else:
            inputs = (x.to(kv.dtype) for x in (do, q, k, v))
            dq, dk, dv = tiles.matmul_backward(*inputs, lse, tile.gather(delta_TN, rows), kv.scale)
        partial_dq_ED[tile.first : tile.last] = tile.entries_of(dq)
        tile.add_to_keys(dk_SD, dk)
        tile.add_to_keys(dv_SD, dv)
