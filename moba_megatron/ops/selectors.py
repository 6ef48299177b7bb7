"""Selectors: which past blocks a query attends, as block ids.

A selector sees, for a tile of queries, the number of past blocks each may choose from and (if it asks) their scores,
and returns ids. Attention knows only ids, so a sliding window or an attention sink is a selector and not another code
path. The current block is not the selector's business: it is always attended.

Scores are masked with -inf where a block is no candidate. A selector that asks for scores returns columns of them; one
that does not returns block numbers within the document. Either way -1 stands where a query has fewer blocks than asked
for.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Selector(Protocol):
    """A choice of past blocks.

    Attributes:
        uses_scores: whether `choose` wants scores; where False none are computed.
    """

    uses_scores: bool

    def choose(self, scores: Tensor | None, num_past_blocks: Tensor, num_chosen: int) -> Tensor:
        """Choose up to `num_chosen` past blocks per row.

        Args:
            scores: [rows..., columns] in fp32 or wider, -inf where no candidate; may be overwritten. None if not asked
                for.
            num_past_blocks: int64 [rows...], complete blocks of the document before the query's own.
            num_chosen: ids to return per row.

        Returns:
            int64 [rows..., num_chosen] columns or block numbers (see above), -1 where fewer.
        """
        ...


class TopK:
    """The best-scored blocks by falling score, equal scores by lower number (MoBA report, equation 5).

    Takes the maximum `num_chosen` times: `torch.max` returns the first of equal maxima, by contract, so that ties are
    exact, and for the few blocks MoBA takes it costs less than a partial sort, whose order among ties is left open.

    >>> TopK().choose(torch.tensor([[1.0, 5.0, 5.0, float("-inf")]]), torch.tensor([3]), 2).tolist()
    [[1, 2]]
    """

    uses_scores = True

    def choose(self, scores: Tensor | None, num_past_blocks: Tensor, num_chosen: int) -> Tensor:
        assert scores is not None
        ids = scores.new_full((*scores.shape[:-1], num_chosen), -1, dtype=torch.int64)
        for place in range(min(num_chosen, scores.shape[-1])):
            best, block = scores.max(dim=-1)
            ids[..., place] = block.masked_fill_(best == -torch.inf, -1)
            scores.scatter_(-1, block.clamp_(min=0).unsqueeze(-1), -torch.inf)
        return ids


class Recent:
    """The most recent past blocks, nearest first: a sliding window.

    >>> Recent().choose(None, torch.tensor([3, 1]), 2).tolist()
    [[2, 1], [0, -1]]
    """

    uses_scores = False

    def choose(self, scores: Tensor | None, num_past_blocks: Tensor, num_chosen: int) -> Tensor:
        back = torch.arange(1, num_chosen + 1, device=num_past_blocks.device)
        return (num_past_blocks.unsqueeze(-1) - back).clamp_(min=-1)


class SinkAndRecent:
    """The document's first block, then the most recent ones: a sliding window with an attention sink.

    >>> SinkAndRecent().choose(None, torch.tensor([4, 1, 0]), 2).tolist()
    [[0, 3], [0, -1], [-1, -1]]
    """

    uses_scores = False

    def choose(self, scores: Tensor | None, num_past_blocks: Tensor, num_chosen: int) -> Tensor:
        recent = Recent().choose(scores, num_past_blocks, num_chosen - 1)
        sink = torch.zeros_like(num_past_blocks).masked_fill_(num_past_blocks < 1, -1)
        return torch.cat([sink.unsqueeze(-1), recent.masked_fill_(recent == 0, -1)], dim=-1)


TOP_K = TopK()
