"""The steps of the kernels, with the portable routing for selections that they cannot make."""

from __future__ import annotations

from torch import Tensor

from moba_megatron.ops.gathered.backend import GatheredSteps
from moba_megatron.ops.layout import BlockLayout, TokenBlocks
from moba_megatron.ops.selection import Selection
from moba_megatron.ops.triton import attention, backward_dq, routing, summaries


class TritonSteps:
    """`ops.steps.Steps` by the kernels.

    Args:
        selection: how past blocks are chosen.
    """

    def __init__(self, selection: Selection):
        self.summary = selection.make_summary()
        self._selection = selection
        self._portable = None if selection.with_one_budget.is_plain else GatheredSteps(selection)

    def summarize(self, k_TGD: Tensor, layout: BlockLayout) -> Tensor | None:
        if self._portable is not None:
            return self._portable.summarize(k_TGD, layout)
        return summaries.summarize(k_TGD, layout)

    def select_past(self, q_TND: Tensor, summaries_MGD: Tensor | None, layout: TokenBlocks, num_past: int) -> Tensor:
        if self._portable is not None:
            return self._portable.select_past(q_TND, summaries_MGD, layout, num_past)
        assert summaries_MGD is not None
        return self._selection.within_budgets(routing.select_past(q_TND, summaries_MGD, layout, num_past))

    attend = staticmethod(attention.attend)
    attend_forward = staticmethod(attention.attend_forward)
    attend_backward = staticmethod(attention.attend_backward)
    accumulate = staticmethod(attention.accumulate)
    accumulate_backward = staticmethod(attention.accumulate_backward)
    output_delta = staticmethod(backward_dq.output_delta)
