"""The steps of the portable backend."""

from __future__ import annotations

from torch import Tensor

from moba_megatron.ops.gathered import attention, combine, routing, summaries
from moba_megatron.ops.layout import BlockLayout, TokenBlocks
from moba_megatron.ops.selection import Selection


class GatheredSteps:
    """`ops.steps.Steps` in portable PyTorch.

    Args:
        selection: how past blocks are chosen.
    """

    def __init__(self, selection: Selection):
        self.summary = selection.make_summary()
        self._selection, self._selector = selection, selection.make_selector()

    def summarize(self, k_TGD: Tensor, layout: BlockLayout) -> Tensor | None:
        return summaries.summarize(k_TGD, layout, self.summary)

    def select_past(self, q_TND: Tensor, summaries_MGD: Tensor | None, layout: TokenBlocks, num_past: int) -> Tensor:
        how = self._selector, self.summary, self._selection.share_selection
        return self._selection.within_budgets(routing.select_past(q_TND, summaries_MGD, layout, num_past, *how))

    attend = staticmethod(attention.attend)
    attend_forward = staticmethod(attention.attend_forward)
    attend_backward = staticmethod(attention.attend_backward)
    accumulate = staticmethod(attention.accumulate)
    accumulate_backward = staticmethod(attention.accumulate_backward)
    output_delta = staticmethod(combine.output_delta)
