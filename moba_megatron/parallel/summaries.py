"""Block summaries of a whole pack on every rank, from the keys that each rank holds.

Each rank reduces its keys per block it touches, in fp32 or wider; the partial summaries go to all ranks, are combined
in the order of ranks (so that all ranks have the same bits) and finished with the true lengths of the blocks. Blocks
may straddle ranks and may be short. Nothing is rounded on the way, and no gradient travels: selection is a constant.

What travels is the blocks a rank touches and nothing else, filled up to as many as the rank with the most touches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moba_megatron.ops.precision import score_dtype
from moba_megatron.ops.summaries import MEAN, Summary
from moba_megatron.parallel.context_plan import ContextPlan
from moba_megatron.parallel.wire import Pending, Wire


class SummaryExchange:
    """An exchange of summaries under way: made before other work, asked for afterwards.

    Args:
        k_TGD: this rank's keys [t, G, D].
    """

    def __init__(self, plan: ContextPlan, wire: Wire, k_TGD: Tensor, summary: Summary = MEAN):
        self.plan, self.summary = plan, summary
        touched = plan.here.touched.numel()
        partial = summary.partial(k_TGD, plan.local_blocks, touched)
        self.nothing = summary.partial(k_TGD[:0], plan.local_blocks[:0], plan.layout.num_blocks)
        message = partial.new_zeros(most_touched(plan), *partial.shape[1:])
        message[:touched] = partial
        self.pending: Pending = wire.all_gather(message, "summaries")

    def wait(self) -> Tensor:
        """Summaries [M, G, D] (fp32 or wider) of all blocks of the pack."""
        total = self.nothing
        for rank, partial in enumerate(self.pending.wait()):
            touched = self.plan.touched[rank]
            total[touched] = self.summary.combine(total[touched], partial[: touched.numel()])
        return self.summary.finish(total, self.plan.block_lengths)


def most_touched(plan: ContextPlan) -> int:
    """Blocks touched by the rank that touches most."""
    return max(plan.shard(rank).touched.numel() for rank in range(plan.size))


def summary_bytes(plan: ContextPlan, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> int:
    """Bytes a rank receives: summaries of `num_kv_heads` kv heads of `head_size` for keys of a dtype."""
    return (plan.size - 1) * most_touched(plan) * num_kv_heads * head_size * score_dtype(dtype).itemsize
