"""Which of some keys some queries attend: the work of one attention call, whether the keys are a whole pack or the part
of it that one rank holds.

Keys lie in kv blocks, which a query attends whole or not at all. In a whole pack these are MoBA's blocks. Where the
tokens of a block lie on several ranks, a rank's part of it is cut at every gap; a kv block then reaches from the rank's
first key of the block to one of these cuts, so that a past block is the longest kv block of its block, and what a query
sees of its own block before its own span of tokens is a shorter one. What remains are the causal spans, where queries
and keys are the same rows.

Legend: T query tokens, N query heads, K past blocks per query, M blocks, t tokens of a range, H heads of a range.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moba_megatron.ops.layout import BlockLayout


@dataclass(frozen=True)
class Fragment:
    """Some keys as some queries see them.

    Attributes:
        kv_blocks: (first key row, one past the last) of each kv block.
        causal_spans: (first row, spans, rows of each) of adjacent equally long causal spans.
        first_block_T: int64 [T], pack-wide number of the first block of each query's document; None where ids are
            numbers of kv blocks already.
        kv_block_of_block: int32 [M], the kv block that holds all keys at hand of a block, -1 where there are none; None
            where pack-wide block numbers are numbers of kv blocks.
        own_kv_block_T: int32 [T], the kv block of the query's own block that lies before it, -1 where there is none;
            None where that holds for all queries.
        most_held: blocks at hand, at most, among those from which a query may choose; None where that is not known.
            With less than K a backend needs no slot for every id.
        device_forms: what a backend makes of it for a device, made once and kept with it
            (`triton.fragments.on_device`).
    """

    kv_blocks: list[tuple[int, int]]
    causal_spans: list[tuple[int, int, int]]
    first_block_T: Tensor | None = None
    kv_block_of_block: Tensor | None = None
    own_kv_block_T: Tensor | None = None
    most_held: int | None = None
    device_forms: dict[torch.device, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def num_slots(self, num_past: int) -> int:
        """Slots of a query row for K = `num_past` ids: one for each id, and one for its own block's kv block."""
        return num_past + (self.own_kv_block_T is not None)

    def chosen_kv_blocks(self, ids_TNK: Tensor, tokens: slice, heads: slice) -> Tensor:
        """int32 [t, H, `num_slots(K)`]: kv blocks of these tokens' and heads' ids, -1 for none."""
        chosen_tHK = ids_TNK[tokens, heads]
        if self.first_block_T is not None:
            blocks_tHK = chosen_tHK + self.first_block_T[tokens].to(torch.int32).view(-1, 1, 1)
            if self.kv_block_of_block is not None:
                # An unused slot's block number may belong to another document: it is looked up and then masked.
                blocks_tHK = self.kv_block_of_block[blocks_tHK.clamp_(min=0)]
            chosen_tHK = blocks_tHK.masked_fill_(chosen_tHK < 0, -1)
        if self.own_kv_block_T is None:
            return chosen_tHK
        own_tH1 = self.own_kv_block_T[tokens].view(-1, 1, 1).expand(-1, chosen_tHK.shape[1], 1)
        return torch.cat([chosen_tHK, own_tH1], dim=-1)


def whole_pack(layout: BlockLayout) -> Fragment:
    """All keys of a pack: a kv block is a block, and every block is a causal span too."""
    return Fragment(layout.block_rows(), layout.equal_blocks(), first_block_T=layout.first_block_T)


@dataclass(frozen=True)
class Keys:
    """Keys and values of some kv heads.

    Attributes:
        k, v: [rows, kv heads at hand, D].
        qheads_per_kvhead: query heads that share a kv head.
        first_kv_head: number of the first kv head at hand among all those that the queries have.
    """

    k: Tensor
    v: Tensor
    qheads_per_kvhead: int
    first_kv_head: int = 0
