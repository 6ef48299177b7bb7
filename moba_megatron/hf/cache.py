"""A key/value cache for generation with MoBA: room kept ahead, and block summaries beside the keys.

transformers' dynamic cache copies itself at each step. Here a layer's room doubles when it is full, so that a step
writes its own token only. The keys that `update` returns carry the layer's summaries as an attribute
(`block_summaries`), which the attention brings up to date when it needs them: where blocks start is known only there,
from the padding. A cache without that attribute (transformers' own) gives the same results; its summaries are made anew
at each step.

Summaries follow what happens to the keys: reordering by beam search, repeating and choosing rows, cropping.

A model with an index of blocks (`block_router`) keeps its index keys here as well, each in a layer behind the model's
own, whose summaries are then those that choose.

Legend: b rows, S slots, G key heads, D head size, B block size, M blocks there is room for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from moba_megatron.ops.decode import block_summaries
from moba_megatron.ops.selection import MOBA, Selection

SMALLEST_ROOM = 64


class BlockSummaries:
    """What the complete blocks of each row show of their keys (mostly the mean), brought up to date on demand.

    Attributes:
        values: [b, M, G, D] in fp32 or wider (2 D for `min_max`), None before the first use; of row r the first
            `blocks[r]` are valid.
        blocks: complete blocks known of each row.
        first: slot at which each row's blocks start.
        block_size: B, 0 before the first use.
        selection: whose summaries these are.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.values: Tensor | None = None
        self.blocks: list[int] = []
        self.first: list[int] = []
        self.block_size = 0
        self.selection = MOBA

    def of_row(
        self, row: int, k_SGD: Tensor, first: int, rows: int, block_size: int, selection: Selection = MOBA
    ) -> Tensor:
        """Summaries [M, G, D or 2 D] of all complete blocks of a row's text.

        Args:
            k_SGD: keys of the text, which starts at slot `first` of the row.
            rows: b.
            selection: one that looks at scores.
        """
        settings = (block_size, selection)
        if self.values is None or (self.block_size, self.selection) != settings or len(self.blocks) != rows:
            none = block_summaries(k_SGD[:0], block_size, selection=selection)
            self.values = none.new_empty(rows, 0, *none.shape[1:])
            self.blocks, self.first = [0] * rows, [first] * rows
            self.block_size, self.selection = settings
        if self.first[row] != first:
            self.first[row], self.blocks[row] = first, 0
        known, complete = self.blocks[row], k_SGD.shape[0] // block_size
        if complete > known:
            self._reserve(complete)
            self.values[row, known:complete] = block_summaries(k_SGD, block_size, known, selection)
            self.blocks[row] = complete
        return self.values[row, :complete]

    def of_all(self, k_bSGD: Tensor, first: int, block_size: int, selection: Selection = MOBA) -> Tensor:
        """Summaries [b, room for blocks, G, D or 2 D] of texts of one length that start at one slot."""
        for row, k_SGD in enumerate(k_bSGD):
            self.of_row(row, k_SGD, first, len(k_bSGD), block_size, selection)
        return self.values

    def _reserve(self, blocks: int) -> None:
        room = self.values.shape[1]
        if blocks > room:
            wider = self.values.new_empty(len(self.blocks), max(blocks, 2 * room), *self.values.shape[2:])
            wider[:, :room] = self.values
            self.values = wider

    def crop(self, slots: int) -> None:
        """Forget the blocks beyond this number of slots."""
        self.blocks = [
            min(known, max(0, slots - first) // self.block_size)
            for known, first in zip(self.blocks, self.first, strict=True)
        ]

    def select(self, indices: Tensor) -> None:
        """Row i becomes what row indices[i] was."""
        if self.values is not None:
            self.values = self.values.index_select(0, indices.to(self.values.device))
            chosen = indices.tolist()
            self.blocks, self.first = ([values[row] for row in chosen] for values in (self.blocks, self.first))


class MoBACacheLayer(DynamicLayer):
    """Keys and values of one layer, [b, G, S, D], in room kept ahead.

    Args:
        room: tokens to keep room for at first.
    """

    def __init__(self, room: int = 0) -> None:
        super().__init__()
        self.room = room
        self.summaries = BlockSummaries()
        self._store: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self._store = None
        self.keys = self.values = key_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append. Returns views of all keys and values; the keys carry `block_summaries`.

        Raises:
            ValueError: keys and values of different sizes, or another number of rows than the cache has.
        """
        if key_states.shape != value_states.shape:
            raise ValueError(
                f"keys and values must have one shape, got {tuple(key_states.shape)} and {tuple(value_states.shape)}"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, rows = self.get_seq_length(), key_states.shape[0]
        if before and self.keys.shape[0] != rows:
            raise ValueError(
                f"the cache holds {self.keys.shape[0]} rows, got {rows}: batch_repeat_interleave repeats them for beams"
            )
        end = before + key_states.shape[2]
        if self._store is None or end > self._store.shape[3] or self._store.shape[1] != rows:
            self._move(key_states, end)
        self._store[0, :, :, before:end] = key_states
        self._store[1, :, :, before:end] = value_states
        self._show(end)
        self.keys.block_summaries = self.summaries
        return self.keys, self.values

    def _move(self, like: Tensor, end: int) -> None:
        b, groups, _, size = like.shape
        store = like.new_empty(
            2, b, groups, max(self.room, 2 * end if self._store is not None else end, SMALLEST_ROOM), size
        )
        kept = self.get_seq_length()
        if kept:
            store[0, :, :, :kept], store[1, :, :, :kept] = self.keys, self.values
        self._store = store

    def _show(self, length: int) -> None:
        self.keys, self.values = self._store[0, :, :, :length], self._store[1, :, :, :length]

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Slots after the next update, and dropped ones: none. transformers 4.57 passes positions, 5 a number."""
        new = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.get_seq_length() + new, 0

    def reset(self) -> None:
        """Forget all tokens; the room stays."""
        if self._store is not None:
            self._show(0)
        self.summaries.clear()

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` tokens, or drop the last -`max_length`."""
        length = self.get_seq_length()
        kept = min(length, max_length) if max_length > 0 else max(0, length + max_length)
        if kept < length:
            self._show(kept)
            self.summaries.crop(kept)

    def _select(self, indices: Tensor) -> None:
        if self.get_seq_length() == 0:
            return
        indices = indices.to(self.device)
        keys, values = (x.index_select(0, indices) for x in (self.keys, self.values))
        if keys.shape[0] == self._store.shape[1]:
            self.keys.copy_(keys)
            self.values.copy_(values)
        else:
            self.keys, self.values = keys, values
            self._move(keys, keys.shape[2])
            self._show(keys.shape[2])
        self.summaries.select(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i goes on from row `beam_idx[i]`."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times, side by side."""
        if self.get_seq_length():
            self._select(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        if self.get_seq_length():
            self._select(torch.arange(self.keys.shape[0], device=indices.device)[indices])


class MoBACache(Cache):
    """The cache for `generate(..., past_key_values=MoBACache())`: time per token that does not grow by copying.

    Args:
        room: tokens of prompt and new text together to keep room for; more is made when they are exceeded.

    Memory of a layer: 2 b G D elements of the keys' dtype for each token of room, and b G D fp32 values for each block.
    """

    def __init__(self, room: int = 0) -> None:
        super().__init__(layers=[])
        self._room = room

    def make_layer(self) -> MoBACacheLayer:
        """An empty layer of this cache."""
        return MoBACacheLayer(self._room)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        """Append to a layer, which is made if it is not there yet; see `MoBACacheLayer.update`."""
        while len(self.layers) <= layer_idx:
            self.layers.append(self.make_layer())
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)
