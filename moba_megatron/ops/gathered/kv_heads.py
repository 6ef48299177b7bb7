"""The work of a call in portable PyTorch, cut into single key heads with some of their query heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moba_megatron.ops.fragments import Fragment, Keys
from moba_megatron.ops.gathered.index import Entries, heads_at_once, most_entries, sort_entries, token_ranges
from moba_megatron.ops.precision import score_dtype

ROWS_OF_TRIANGLE = 128

# Scores of one tile per thread: 1 MiB in fp32, half of a current core's second cache. An accelerator wants larger
# tiles.
SCORES_PER_THREAD = 2**18

SCORES_ON_ACCELERATOR = 2**26


@dataclass(frozen=True)
class Pass:
    """One key head with some of its query heads: queries of all heads [T, N, D], keys and values of one head [S, D]."""

    heads: slice
    group: int
    most_entries: int
    q: Tensor
    k: Tensor
    v: Tensor
    ids: Tensor
    fragment: Fragment
    scale: float
    dtype: torch.dtype
    triangle: Tensor

    @property
    def split(self) -> int:
        """Parts into which a tile's rows are cut to run side by side: one per CPU thread."""
        return min(torch.get_num_threads(), 8) if self.q.device.type == "cpu" else 1

    @property
    def scores_budget(self) -> int:
        return SCORES_PER_THREAD * self.split if self.q.device.type == "cpu" else SCORES_ON_ACCELERATOR

    def entries(self) -> Iterator[Entries]:
        """The work lists of units, one range of tokens after the other."""
        num_tokens, per_query = self.ids.shape[0], self.fragment.per_query(self.ids.shape[2])
        if per_query and num_tokens:
            num_heads = self.heads.stop - self.heads.start
            for tokens in token_ranges(num_tokens, num_heads, per_query, self.most_entries):
                yield sort_entries(self.ids, tokens, self.heads, self.fragment)


def passes(
    q: Tensor, keys: Keys, ids: Tensor, fragment: Fragment, scale: float, workspace_bytes: int | None
) -> Iterator[Pass]:
    """All passes of one attention call, key head by key head."""
    size = keys.group_size
    most = most_entries(q, size, workspace_bytes)
    step = heads_at_once(q.shape[0], size, fragment.per_query(ids.shape[2]), most)
    dtype = score_dtype(q.dtype)
    side = min(ROWS_OF_TRIANGLE, max((length for _, _, length in fragment.triangles), default=0))
    triangle = torch.ones(side, side, dtype=torch.bool, device=q.device).triu_(1)
    for group in range(keys.k.shape[1]):
        k_SD, v_SD = keys.k[:, group].contiguous(), keys.v[:, group].contiguous()
        head = (keys.first + group) * size
        for first in range(head, head + size, step):
            heads = slice(first, min(first + step, head + size))
            yield Pass(heads, group, most, q, k_SD, v_SD, ids, fragment, scale, dtype, triangle)
