"""Block summaries: what a block shows of its keys to the gate.

A summary is three small steps, so that a block whose tokens lie on several ranks is summarised exactly as one whose
tokens lie together: `partial` reduces the tokens at hand, `combine` joins two partials, `finish` turns one into the
vector that queries are scored against. The mean (MoBA report, equation 6) is a sum, divided in the end by the number of
the block's tokens, which the layout knows. Sums are in fp32, or in the keys' dtype where that is wider; nothing is
rounded on the way.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moba_megatron.ops.precision import score_dtype


class Summary(Protocol):
    """Partial, combine, finish. A partial is a tensor whose first dimensions are the block and the key head."""

    def partial(self, k_TGD: Tensor, block_T: Tensor, num_blocks: int) -> Tensor: ...

    def combine(self, left: Tensor, right: Tensor) -> Tensor: ...

    def finish(self, partial: Tensor, lengths_M: Tensor) -> Tensor: ...


class MeanSummary:
    """The mean of a block's keys.

    >>> mean = MeanSummary()
    >>> keys = torch.tensor([1.0, 3.0, 10.0]).view(3, 1, 1)
    >>> mean.finish(mean.partial(keys, torch.tensor([0, 0, 1]), 2), torch.tensor([2, 1])).flatten().tolist()
    [2.0, 10.0]
    """

    def partial(self, k_TGD: Tensor, block_T: Tensor, num_blocks: int) -> Tensor:
        """Sums of the tokens at hand.

        Args:
            k_TGD: keys [T, G, D] of any tokens, in order of their blocks.
            block_T: int64 [T], rising, the block of each token.
            num_blocks: M.

        Returns:
            [M, G, D] in fp32 or wider; zero for a block without tokens here.
        """
        dtype = score_dtype(k_TGD.dtype)
        if k_TGD.device.type == "cpu":
            return torch.zeros(num_blocks, *k_TGD.shape[1:], dtype=dtype).index_add_(0, block_T, k_TGD.to(dtype))
        # index_add_ on an accelerator adds in no fixed order; a segmented sum does.
        blocks = torch.arange(num_blocks, device=block_T.device)
        lengths = torch.searchsorted(block_T, blocks, right=True) - torch.searchsorted(block_T, blocks)
        return torch.segment_reduce(k_TGD.to(dtype), "sum", lengths=lengths, initial=0, unsafe=True)

    def combine(self, left: Tensor, right: Tensor) -> Tensor:
        """Add sums."""
        return left + right

    def finish(self, partial: Tensor, lengths_M: Tensor) -> Tensor:
        """Means [M, G, D], for int64 [M] tokens of each block; zero for a block without tokens."""
        return partial / lengths_M.clamp(min=1).to(partial.dtype).view(-1, 1, 1)


MEAN = MeanSummary()
