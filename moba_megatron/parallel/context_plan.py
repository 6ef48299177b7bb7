"""The plan of one pack under context parallelism: from the layout, for any rank, what lies where. No communication.

A *shard* is what one rank holds: tokens in rising order of their positions, which are the positions of several ranks'
zigzag tokens where heads are exchanged inside a node. Everything follows from positions and block numbers, never from
slices, so that zigzag order, packs and blocks that straddle ranks are no special cases.

The spans of a shard are its rows with adjacent positions in one block. The tokens of two ranks interleave only at the
ends of spans, so a query sees of another rank's span all keys or none; within its own span it sees the keys up to
itself. That gives the kv blocks and causal spans of `ops.fragments`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from moba_megatron.ops.fragments import Fragment
from moba_megatron.ops.layout import BlockLayout, TokenBlocks, block_layout
from moba_megatron.ops.upload import upload
from moba_megatron.parallel.layout import shard_positions


@dataclass(frozen=True)
class Shard:
    """The tokens of one rank and their spans; everything on the host.

    Attributes:
        positions: int64 [t], position of each token in the pack.
        blocks: blocks of these tokens.
        cu_spans: int64 [spans + 1], boundaries of the spans in rows of the shard.
        span_block: int64 [spans], pack-wide block of each span, rising.
        span_last: int64 [spans], last position of each span.
    """

    positions: Tensor
    blocks: TokenBlocks
    cu_spans: Tensor
    span_block: Tensor
    span_last: Tensor

    @functools.cached_property
    def touched(self) -> Tensor:
        """int64 [blocks], rising: the blocks that have tokens here."""
        return torch.unique_consecutive(self.span_block)

    def touched_rows(self) -> Tensor:
        """int64 [t], for each token the place of its block among `touched`."""
        return torch.unique_consecutive(self.blocks.pack_block_T, return_inverse=True)[1]

    def kv_blocks(self) -> list[tuple[int, int]]:
        """(first row, one past the last) of each kv block, one for each span: from the first row of the span's block to
        the span's last."""
        first_of_block = torch.searchsorted(self.span_block, self.span_block)
        starts, ends = self.cu_spans[first_of_block], self.cu_spans[1:]
        return list(zip(starts.tolist(), ends.tolist(), strict=True))

    def kv_block_of_block(self) -> Tensor:
        """int32 [M], the kv block with all rows of a block, -1 where there are none."""
        blocks = torch.arange(self.blocks.num_blocks)
        last = torch.searchsorted(self.span_block, blocks, right=True) - 1
        found = (last >= 0) & (self.span_block[last.clamp(min=0)] == blocks)
        return torch.where(found, last, -1).to(torch.int32)

    def causal_spans(self) -> list[tuple[int, int, int]]:
        """Adjacent spans of one length as (first row, spans, tokens of each)."""
        found, row = [], 0
        for length, same in itertools.groupby(self.cu_spans.diff().tolist()):
            count = len(list(same))
            found.append((row, count, length))
            row += count * length
        return found


def make_shard(layout: BlockLayout, positions: Tensor) -> Shard:
    """Cut the tokens at these positions (int64, rising) into spans."""
    blocks = layout.at(positions)
    block_T = blocks.pack_block_T
    starts = torch.ones(positions.numel(), dtype=torch.bool)
    starts[1:] = (positions.diff() != 1) | (block_T.diff() != 0)
    first_rows = torch.nonzero(starts).flatten()
    rows = torch.cat([first_rows, first_rows.new_tensor([positions.numel()])])
    return Shard(positions, blocks, rows, block_T[first_rows], positions[rows[1:] - 1])


class ContextPlan:
    """Who holds what of one pack, for blocks of one size.

    Args:
        cu_seqlens: int64 [documents + 1] on the host, padded boundaries.
        block_size: B; None: full attention, which is one block per document.
        levels: (ranks that exchange heads, shards), see the module; (1, C) where no heads are exchanged.
        rank: of this shard.
        device: where the queries live.

    Raises:
        ValueError: boundaries that do not fit the zigzag layout.
    """

    def __init__(
        self,
        cu_seqlens: Tensor,
        block_size: int | None,
        levels: tuple[int, int],
        rank: int,
        device: torch.device,
    ):
        inner, self.size = levels
        total = int(cu_seqlens[-1])
        size = block_size or max(1, int(cu_seqlens.diff().max()))
        self.layout = block_layout(total, size, cu_seqlens)
        self.rank, self.device = rank, device
        self._fragments: dict[int, Fragment] = {}
        self._shards = [
            make_shard(self.layout, _union(cu_seqlens, inner * self.size, range(shard * inner, (shard + 1) * inner)))
            for shard in range(self.size)
        ]

    @property
    def here(self) -> Shard:
        return self._shards[self.rank]

    def shard(self, rank: int) -> Shard:
        return self._shards[rank]

    @functools.cached_property
    def queries(self) -> TokenBlocks:
        """Blocks of this rank's tokens, on their device."""
        blocks = self.here.blocks
        return TokenBlocks(
            blocks.num_blocks, upload(blocks.block_T, self.device), upload(blocks.first_block_T, self.device)
        )

    @functools.cached_property
    def touched(self) -> list[Tensor]:
        """For each rank the blocks that it touches, on the queries' device."""
        return [upload(shard.touched, self.device) for shard in self._shards]

    @functools.cached_property
    def block_lengths(self) -> Tensor:
        """int64 [M], tokens of each block of the pack, on the queries' device."""
        return upload(self.layout.block_lengths(), self.device)

    @functools.cached_property
    def elsewhere(self) -> Tensor:
        """bool [M], on the queries' device: blocks with tokens on other ranks."""
        return upload(self.held.sum(dim=0) > self.held[self.rank], self.device)

    @functools.cached_property
    def held(self) -> Tensor:
        """int64 [C, M], on the host: 1 for a block with tokens on a rank."""
        held_CM = torch.zeros(self.size, self.layout.num_blocks, dtype=torch.int64)
        for rank in range(self.size):
            held_CM[rank, self.shard(rank).touched] = 1
        return held_CM

    @functools.cached_property
    def local_blocks(self) -> Tensor:
        """int64 [t], for each of this rank's tokens the place of its block among those it touches."""
        return upload(self.here.touched_rows(), self.device)

    @functools.cached_property
    def own_blocks(self) -> Fragment:
        """This rank's keys as far as queries see them without any choice: their own blocks. For K = 0."""
        return dataclasses.replace(self.fragment(self.rank), kv_block_of_block=None, first_block_T=None)

    @functools.cached_property
    def own_choices(self) -> Fragment:
        """The rest of this rank's keys: chosen past blocks."""
        return dataclasses.replace(self.fragment(self.rank), causal_spans=[], own_kv_block_T=None)

    @functools.cached_property
    def guest_choices(self) -> Fragment:
        """This rank's keys for queries of other ranks, which name kv blocks."""
        return Fragment(self.own_choices.kv_blocks, [])

    def fragment(self, source: int) -> Fragment:
        """The keys of one rank as this rank's queries see them; causal spans where it is this rank itself."""
        if source not in self._fragments:
            self._fragments[source] = self._fragment(source)
        return self._fragments[source]

    def _fragment(self, source: int) -> Fragment:
        keys = self.shard(source)
        before = torch.searchsorted(keys.span_last, self.here.positions) - 1
        own_block = self.here.blocks.pack_block_T
        found = (before >= 0) & (keys.span_block[before.clamp(min=0)] == own_block)
        own_kv_block = torch.where(found, before, -1).to(torch.int32)
        kv_block_of_block = keys.kv_block_of_block()
        # Of the blocks of a query's document before its own, those with keys at hand.
        held_before = torch.cat([torch.zeros(1, dtype=torch.int64), (kv_block_of_block >= 0).cumsum(0)])
        held = held_before[own_block] - held_before[self.here.blocks.first_block_T]
        return Fragment(
            kv_blocks=keys.kv_blocks(),
            causal_spans=keys.causal_spans() if source == self.rank else [],
            first_block_T=self.queries.first_block_T,
            kv_block_of_block=upload(kv_block_of_block, self.device),
            own_kv_block_T=upload(own_kv_block, self.device) if bool(found.any()) else None,
            most_held=int(held.max()) if held.numel() else 0,
        )


def _union(cu_seqlens: Tensor, context_size: int, ranks: range) -> Tensor:
    """Positions of several ranks together, rising."""
    return torch.cat([shard_positions(cu_seqlens, context_size, rank) for rank in ranks]).sort().values


def plan_context(
    cu_seqlens: Tensor, block_size: int | None, levels: tuple[int, int], rank: int, device: torch.device
) -> ContextPlan:
    """The plan of a pack, made once for all layers of a microbatch.

    Args:
        cu_seqlens: integer [documents + 1]. On an accelerator it is read on the host once: give all layers one tensor.
        others: as for `ContextPlan`.
    """
    return _plan_of(host_boundaries(cu_seqlens), block_size, levels, rank, device)


_read: list[tuple[weakref.ref, int, tuple[int, ...]]] = []
_TENSORS_KEPT = 8


def host_boundaries(cu_seqlens: Tensor) -> tuple[int, ...]:
    """The values of a tensor of boundaries; remembered for tensors on an accelerator, where reading them waits."""
    if cu_seqlens.device.type == "cpu":
        return tuple(cu_seqlens.tolist())
    now = _changes(cu_seqlens)
    for reference, version, values in _read:
        if reference() is cu_seqlens and version == now:
            return values
    values = tuple(cu_seqlens.tolist())
    remember_boundaries(cu_seqlens, values)
    return values


def remember_boundaries(cu_seqlens: Tensor, values: tuple[int, ...]) -> None:
    """Say what `host_boundaries` would read from a tensor on an accelerator: where the host had the values before."""
    _read.append((weakref.ref(cu_seqlens), _changes(cu_seqlens), values))
    _read[:] = [entry for entry in _read if entry[0]() is not None][-_TENSORS_KEPT:]


def _changes(tensor: Tensor) -> int:
    """How often a tensor was changed in place; tensors made in inference mode do not count that."""
    return 0 if tensor.is_inference() else tensor._version


@functools.lru_cache(maxsize=8)
def _plan_of(
    boundaries: tuple[int, ...], block_size: int | None, levels: tuple[int, int], rank: int, device: torch.device
) -> ContextPlan:
    return ContextPlan(torch.tensor(boundaries), block_size, levels, rank, device)


@functools.lru_cache(maxsize=16)
def inner_order(boundaries: tuple[int, ...], levels: tuple[int, int], shard: int, device: torch.device) -> Tensor:
    """int64 [t]: for each token of a shard, in order, its row among the tokens of the shard's ranks one after the
    other. Copied to the device once for all layers."""
    inner, outer = levels
    ranks = range(shard * inner, (shard + 1) * inner)
    cu_seqlens = torch.tensor(boundaries)
    order = torch.cat([shard_positions(cu_seqlens, inner * outer, rank) for rank in ranks]).argsort()
    with torch.inference_mode(False):
        return upload(order, device)


@functools.lru_cache(maxsize=8)
def boundaries_on(device: torch.device, boundaries: tuple[int, ...]) -> Tensor:
    """int32 [documents + 1], copied to the device once for all layers."""
    with torch.inference_mode(False):
        return upload(torch.tensor(boundaries, dtype=torch.int32), device)
