"""The work of a call, cut into groups of kv heads with their query heads, as `triton.passes` does.

A group is as many whole kv heads as one index may hold (`index.most_entries`), or some query heads of one. Keys and
values of a group lie dense, kv head after kv head, so that the kv blocks of all of them go through the same tiles.
Tiles are cut so that their scores stay in a core's cache.

Legend: T query tokens, N query heads, S key rows, D head size, K past blocks per query, g kv heads of a group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moba_megatron.ops.fragments import Fragment, Keys
from moba_megatron.ops.gathered.index import (
    Index,
    build_index,
    heads_at_once,
    kv_heads_at_once,
    most_entries,
    token_ranges,
)
from moba_megatron.ops.precision import score_dtype

# Rows of a causal span that are taken at a time.
CAUSAL_ROWS = 128
# Scores of one tile per thread: 1 MiB in fp32, half of a current core's second cache. An accelerator wants larger
# tiles.
SCORES_PER_THREAD = 2**18
SCORES_ON_ACCELERATOR = 2**26


@dataclass(frozen=True)
class KVHeads:
    """Some kv heads with their query heads, or one with some of them.

    Attributes:
        heads: these query heads, as a slice of N.
        kv_heads: these kv heads, as a slice of those at hand.
        qheads_per_kvhead: query heads that share a kv head.
        most_entries: what an index may hold.
        q: contiguous [T, N, D], of all heads.
        k, v: contiguous [g, S, D].
        ids: int32 [T, N, K].
        scale: factor on the scores.
        dtype: of scores and sums.
        causal_mask: bool, square, true above the diagonal.
    """

    heads: slice
    kv_heads: slice
    qheads_per_kvhead: int
    most_entries: int
    q: Tensor
    k: Tensor
    v: Tensor
    ids: Tensor
    fragment: Fragment
    scale: float
    dtype: torch.dtype
    causal_mask: Tensor

    @cached_property
    def k_wide(self) -> Tensor:
        """Keys [g, S, D] in the scores' dtype."""
        return self.k.to(self.dtype)

    @cached_property
    def v_wide(self) -> Tensor:
        """Values [g, S, D] in the scores' dtype."""
        return self.v.to(self.dtype)

    @property
    def batches(self) -> int:
        """Batches into which a tile's rows are cut to run side by side: one per CPU thread."""
        return min(torch.get_num_threads(), 8) if self.k.device.type == "cpu" else 1

    @property
    def scores_budget(self) -> int:
        """Scores of a tile."""
        return SCORES_PER_THREAD * self.batches if self.k.device.type == "cpu" else SCORES_ON_ACCELERATOR

    def kv_head_of(self, head: int) -> int:
        """The kv head of a query head, among those of this group."""
        return (head - self.heads.start) // self.qheads_per_kvhead

    def indexes(self) -> Iterator[Index]:
        """The index of one range of tokens after the other."""
        num_tokens, num_slots = self.ids.shape[0], self.fragment.num_slots(self.ids.shape[2])
        if num_slots and num_tokens:
            num_heads = self.heads.stop - self.heads.start
            for tokens in token_ranges(num_tokens, num_heads, num_slots, self.most_entries):
                yield build_index(self.ids, tokens, self.heads, self.fragment, self.qheads_per_kvhead, self.k.shape[1])


def each_group(
    q: Tensor, keys: Keys, ids: Tensor, fragment: Fragment, scale: float, workspace_bytes: int | None
) -> Iterator[KVHeads]:
    """The kv heads of one attention call, in order; one of them several times where its query heads do not fit."""
    size, num_kv_heads = keys.qheads_per_kvhead, keys.k.shape[1]
    num_tokens, num_slots = q.shape[0], fragment.num_slots(ids.shape[2])
    most = most_entries(q, size, workspace_bytes)
    step = heads_at_once(num_tokens, size, num_slots, most)
    together = kv_heads_at_once(num_tokens, size, num_slots, most)
    dtype = score_dtype(q.dtype)
    side = min(CAUSAL_ROWS, max((length for _, _, length in fragment.causal_spans), default=0))
    causal_mask = torch.ones(side, side, dtype=torch.bool, device=q.device).triu_(1)
    for first_kv_head in range(0, num_kv_heads, together):
        kv_heads = slice(first_kv_head, min(first_kv_head + together, num_kv_heads))
        k, v = (x[:, kv_heads].transpose(0, 1).contiguous() for x in (keys.k, keys.v))
        first, stop = ((keys.first_kv_head + kv_head) * size for kv_head in (kv_heads.start, kv_heads.stop))
        for head in range(first, stop, step if together == 1 else stop - first):
            heads = slice(head, min(head + step, stop) if together == 1 else stop)
            yield KVHeads(heads, kv_heads, size, most, q, k, v, ids, fragment, scale, dtype, causal_mask)
