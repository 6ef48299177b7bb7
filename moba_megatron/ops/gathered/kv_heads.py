"""The work of a call, cut into single kv heads with some of their query heads; the twin of `triton.passes`.

Keys and values of a kv head lie dense; tiles are cut so that their scores stay in a core's cache.

Legend: T query tokens, N query heads, S key rows, D head size, K past blocks per query.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moba_megatron.ops.fragments import Fragment, Keys
from moba_megatron.ops.gathered.index import Index, build_index, heads_at_once, most_entries, token_ranges
from moba_megatron.ops.precision import score_dtype

# Rows of a causal span that are taken at a time.
CAUSAL_ROWS = 128
# Scores of one tile per thread: 1 MiB in fp32, half of a current core's second cache. An accelerator wants larger
# tiles.
SCORES_PER_THREAD = 2**18
SCORES_ON_ACCELERATOR = 2**26


@dataclass(frozen=True)
class KVHead:
    """One kv head with some of its query heads.

    Attributes:
        heads: these query heads, as a slice of N.
        kv_head: number of the kv head among those at hand.
        most_entries: what an index may hold.
        q: [T, N, D], of all heads.
        k, v: contiguous [S, D].
        ids: int32 [T, N, K].
        dtype: of scores and sums.
        causal_mask: bool, square, true above the diagonal.
    """

    heads: slice
    kv_head: int
    most_entries: int
    q: Tensor
    k: Tensor
    v: Tensor
    ids: Tensor
    fragment: Fragment
    scale: float
    dtype: torch.dtype
    causal_mask: Tensor

    @property
    def batches(self) -> int:
        """Batches into which a tile's rows are cut to run side by side: one per CPU thread."""
        return min(torch.get_num_threads(), 8) if self.q.device.type == "cpu" else 1

    @property
    def scores_budget(self) -> int:
        """Scores of a tile."""
        return SCORES_PER_THREAD * self.batches if self.q.device.type == "cpu" else SCORES_ON_ACCELERATOR

    def indexes(self) -> Iterator[Index]:
        """The index of one range of tokens after the other."""
        num_tokens, num_slots = self.ids.shape[0], self.fragment.num_slots(self.ids.shape[2])
        if num_slots and num_tokens:
            num_heads = self.heads.stop - self.heads.start
            for tokens in token_ranges(num_tokens, num_heads, num_slots, self.most_entries):
                yield build_index(self.ids, tokens, self.heads, self.fragment)


def each_kv_head(
    q: Tensor, keys: Keys, ids: Tensor, fragment: Fragment, scale: float, workspace_bytes: int | None
) -> Iterator[KVHead]:
    """The kv heads of one attention call, in order; several times each where not all of its query heads fit at once."""
    size = keys.qheads_per_kvhead
    most = most_entries(q, size, workspace_bytes)
    step = heads_at_once(q.shape[0], size, fragment.num_slots(ids.shape[2]), most)
    dtype = score_dtype(q.dtype)
    side = min(CAUSAL_ROWS, max((length for _, _, length in fragment.causal_spans), default=0))
    causal_mask = torch.ones(side, side, dtype=torch.bool, device=q.device).triu_(1)
    for kv_head in range(keys.k.shape[1]):
        k_SD, v_SD = keys.k[:, kv_head].contiguous(), keys.v[:, kv_head].contiguous()
        head = (keys.first_kv_head + kv_head) * size
        for first in range(head, head + size, step):
            heads = slice(first, min(first + step, head + size))
            yield KVHead(heads, kv_head, most, q, k_SD, v_SD, ids, fragment, scale, dtype, causal_mask)
