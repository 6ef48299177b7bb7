"""Block summaries: what a block shows of its keys to the gate.

A summary is three small steps, so that a block whose tokens lie on several ranks is summarised exactly as one whose
tokens lie together: `partial` reduces the tokens at hand, `combine` joins two partials, `finish` turns one into the
vector that queries are scored against: a score is the inner product of that vector and the query, or what the summary
makes of the query. The mean (MoBA report, equation 6) is a sum, divided in the end by the number of the block's tokens,
which the layout knows. Everything is in fp32, or in the keys' dtype where that is wider; nothing is rounded on the way.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moba_megatron.ops.precision import score_dtype


class Summary(Protocol):
    """Partial, combine, finish. A partial is a tensor whose first dimensions are the block and the kv head."""

    def partial(self, k_TGD: Tensor, block_T: Tensor, num_blocks: int) -> Tensor: ...

    def combine(self, left: Tensor, right: Tensor) -> Tensor: ...

    def finish(self, partial: Tensor, lengths_M: Tensor) -> Tensor: ...

    def queries(self, q: Tensor) -> Tensor:
        """What finished summaries are multiplied with, for queries [..., D] in the precision of scores."""
        ...


def _reduce(k_TGD: Tensor, block_T: Tensor, num_blocks: int, how: str, initial: float) -> Tensor:
    """Keys [T, G, D], sorted by block, reduced per block in a fixed order: [M, G, D]."""
    blocks = torch.arange(num_blocks, device=block_T.device)
    lengths = torch.searchsorted(block_T, blocks, right=True) - torch.searchsorted(block_T, blocks)
    return torch.segment_reduce(k_TGD, how, lengths=lengths, initial=initial, unsafe=True)


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
        return _reduce(k_TGD.to(dtype), block_T, num_blocks, "sum", 0)

    def combine(self, left: Tensor, right: Tensor) -> Tensor:
        """Add sums."""
        return left + right

    def finish(self, partial: Tensor, lengths_M: Tensor) -> Tensor:
        """Means [M, G, D], for int64 [M] tokens of each block; zero for a block without tokens."""
        return partial / lengths_M.clamp(min=1).to(partial.dtype).view(-1, 1, 1)

    def queries(self, q: Tensor) -> Tensor:
        """The queries themselves."""
        return q


class MinMaxSummary:
    """The box that a block's keys lie in: per channel the largest key, and the largest with its sign turned
    (Quest, arXiv 2406.10774). The score is the largest inner product that a query could have with a key in the box,
    sum over d of max(q_d max_d, q_d min_d): an inner product of [max, -min] and [q where positive, -q where negative].

    >>> keys, query = torch.tensor([[1.0, -2.0], [3.0, -5.0]]).view(2, 1, 2), torch.tensor([2.0, -1.0])
    >>> summary = MIN_MAX.finish(MIN_MAX.partial(keys, torch.tensor([0, 0]), 1), torch.tensor([2]))
    >>> (MIN_MAX.queries(query) @ summary.flatten()).item()
    11.0
    """

    def partial(self, k_TGD: Tensor, block_T: Tensor, num_blocks: int) -> Tensor:
        """[M, G, 2 D] in fp32 or wider, -inf for a block without tokens here; arguments as for `MeanSummary`."""
        keys = torch.cat([k_TGD, -k_TGD], dim=-1).to(score_dtype(k_TGD.dtype))
        return _reduce(keys, block_T, num_blocks, "max", -torch.inf)

    def combine(self, left: Tensor, right: Tensor) -> Tensor:
        """The box of both."""
        return torch.maximum(left, right)

    def finish(self, partial: Tensor, lengths_M: Tensor) -> Tensor:
        """[M, G, 2 D]; zero for a block without tokens."""
        return partial.masked_fill((lengths_M == 0).view(-1, 1, 1), 0)

    def queries(self, q: Tensor) -> Tensor:
        """[..., 2 D]: the positive parts of q and of -q."""
        return torch.cat([q, -q], dim=-1).relu_()


MEAN, MIN_MAX = MeanSummary(), MinMaxSummary()
