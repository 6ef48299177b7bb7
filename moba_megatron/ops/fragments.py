"""Which of some keys some queries attend: the work of one attention call, whether the keys are a whole pack or the part
of it that one rank holds.

Keys lie in *units*, stretches of adjacent rows that a query attends entirely or not at all. In a whole pack a unit is a
block. Where the tokens of a block lie on several ranks, a rank's part of it is cut at every gap; a unit then reaches
from the rank's first key of the block to one of these cuts, so that a past block is the longest unit of its block, and
what a query sees of its own block before its own stretch of tokens is a shorter one. What remains are *triangles*:
stretches of tokens that attend themselves causally, where queries and keys are the same rows.

Legend: T query tokens, N query heads, K past blocks per query, t tokens of a range, H heads of a list.
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
        units: (first key row, one past the last) of each unit.
        triangles: (first row, stretches, tokens per stretch) of adjacent equally long stretches that attend themselves.
        first_block_T: int64 [T], pack-wide number of the first block of each query's document; None where ids are unit
            numbers already.
        unit_of_block: int32 [M], the unit that holds all keys at hand of a block, -1 where there are none; None where
            pack-wide block numbers are unit numbers.
        own_unit_T: int32 [T], the unit of the query's own block that lies before it, -1 where there is none; None where
            that holds for all queries.
        device_forms: what a backend makes of it for a device, made once and kept with it (`triton.fragment.on_device`).
    """

    units: list[tuple[int, int]]
    triangles: list[tuple[int, int, int]]
    first_block_T: Tensor | None = None
    unit_of_block: Tensor | None = None
    own_unit_T: Tensor | None = None
    device_forms: dict[torch.device, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def per_query(self, num_past: int) -> int:
        """Units a query and head may have, for K = `num_past` ids."""
        return num_past + (self.own_unit_T is not None)

    def chosen_units(self, ids_TNK: Tensor, tokens: slice, heads: slice) -> Tensor:
        """int32 [t, H, `per_query(K)`]: unit numbers of these tokens' and heads' ids, -1 for none."""
        units_tHK = ids_TNK[tokens, heads]
        if self.first_block_T is not None:
            blocks_tHK = units_tHK + self.first_block_T[tokens].to(torch.int32).view(-1, 1, 1)
            if self.unit_of_block is not None:
                # The number of a block that is none may be another document's: it is looked up and then masked.
                blocks_tHK = self.unit_of_block[blocks_tHK.clamp_(min=0)]
            units_tHK = blocks_tHK.masked_fill_(units_tHK < 0, -1)
        if self.own_unit_T is None:
            return units_tHK
        own_tH1 = self.own_unit_T[tokens].view(-1, 1, 1).expand(-1, units_tHK.shape[1], 1)
        return torch.cat([units_tHK, own_tH1], dim=-1)


def whole_pack(layout: BlockLayout) -> Fragment:
    """All keys of a pack: a unit is a block, and every block attends itself causally."""
    return Fragment(layout.block_rows(), layout.runs(), first_block_T=layout.first_block_T)


@dataclass(frozen=True)
class Keys:
    """Keys and values of some key heads.

    Attributes:
        k, v: [rows, heads at hand, D].
        first: number of the first of these heads among the key heads of the queries.
        group_size: query heads per key head.
    """

    k: Tensor
    v: Tensor
    group_size: int
    first: int = 0
