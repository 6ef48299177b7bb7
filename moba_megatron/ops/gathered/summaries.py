"""Summaries of the blocks of a pack whose keys are all here (`ops.summaries` says what a summary is).

Legend: T tokens, G kv heads, D head size, M blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moba_megatron.ops.layout import BlockLayout
from moba_megatron.ops.precision import without_autocast
from moba_megatron.ops.summaries import MEAN, Summary


@torch.no_grad()
@without_autocast
def summarize(k_TGD: Tensor, layout: BlockLayout, summary: Summary | None = MEAN) -> Tensor | None:
    """Summaries [M, G, D] (fp32 or wider) of all blocks of a pack; none where none is asked for."""
    if summary is None:
        return None
    return summary.finish(summary.partial(k_TGD, layout.pack_block_T, layout.num_blocks), layout.block_lengths())
