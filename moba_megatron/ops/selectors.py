"""Selectors: which past blocks a query attends, as block ids.

A selector sees, for a tile of queries, the number of past blocks each may choose from and (if it asks) their scores,
and returns ids. Attention knows only ids, so a sliding window or an attention sink is a selector and not another code
path. The current block is not the selector's business: it is always attended.

Scores are masked with -inf where a block is not a candidate. A selector that asks for scores returns columns of them;
one that does not returns block numbers within the document. Either way -1 stands where a query has fewer blocks than
asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Selector(Protocol):
    """A choice of past blocks.

    Attributes:
        uses_scores: whether `choose` wants scores; where False none are computed.
    """

    uses_scores: bool

    def choose(self, scores: Tensor | None, num_past_blocks: Tensor, num_chosen: int, scale: float = 1.0) -> Tensor:
        """Choose up to `num_chosen` past blocks per row.

        Args:
            scores: [rows..., columns] in fp32 or wider, -inf where no candidate; may be overwritten. None if not asked
                for.
            num_past_blocks: int64 [rows...], complete blocks of the document before the query's own.
            num_chosen: ids to return per row, at least 1.
            scale: what a score is multiplied by before a softmax.

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

    def choose(self, scores: Tensor | None, num_past_blocks: Tensor, num_chosen: int, scale: float = 1.0) -> Tensor:
        assert scores is not None
        ids = scores.new_full((*scores.shape[:-1], num_chosen), -1, dtype=torch.int64)
        for place in range(min(num_chosen, scores.shape[-1])):
            best, block = scores.max(dim=-1)
            ids[..., place] = block.masked_fill_(best == -torch.inf, -1)
            scores.scatter_(-1, block.clamp_(min=0).unsqueeze(-1), -torch.inf)
        return ids


@dataclass(frozen=True)
class Threshold:
    """The best-scored blocks until their share of the softmax over all candidates is reached, ordered as `TopK` orders
    them: a block is taken as long as those before it have less than the share. The idea is VMoBA's (arXiv 2506.23858),
    whose own shares are scores divided by their range, the query's own block counted.

    Shares are of 0.67, 0.24 and 0.09 here, so that 0.9 takes two blocks and 0.6 one:

    >>> scores = torch.tensor([[1.0, 3.0, 2.0, float("-inf")]])
    >>> Threshold(0.9).choose(scores.clone(), torch.tensor([3]), 3).tolist()
    [[1, 2, -1]]
    >>> Threshold(0.6).choose(scores.clone(), torch.tensor([3]), 3).tolist()
    [[1, -1, -1]]
    """

    share: float

    uses_scores = True

    def choose(self, scores: Tensor | None, num_past_blocks: Tensor, num_chosen: int, scale: float = 1.0) -> Tensor:
        assert scores is not None
        # A row without candidates has shares of NaN, which are never below the threshold, and ids of -1 anyway.
        shares = (scores * scale).softmax(dim=-1)
        ids = TOP_K.choose(scores, num_past_blocks, num_chosen)
        chosen = shares.gather(-1, ids.clamp(min=0))
        before = chosen.cumsum(dim=-1) - chosen
        return ids.masked_fill_(before >= self.share, -1)


class Recent:
    """The most recent past blocks, nearest first: a sliding window.

    >>> Recent().choose(None, torch.tensor([3, 1]), 2).tolist()
    [[2, 1], [0, -1]]
    """

    uses_scores = False

    def choose(self, scores: Tensor | None, num_past_blocks: Tensor, num_chosen: int, scale: float = 1.0) -> Tensor:
        back = torch.arange(1, num_chosen + 1, device=num_past_blocks.device)
        return (num_past_blocks.unsqueeze(-1) - back).clamp_(min=-1)


class SinkAndRecent:
    """The document's first block, then the most recent ones: a sliding window with an attention sink.

    >>> SinkAndRecent().choose(None, torch.tensor([4, 1, 0]), 2).tolist()
    [[0, 3], [0, -1], [-1, -1]]
    """

    uses_scores = False

    def choose(self, scores: Tensor | None, num_past_blocks: Tensor, num_chosen: int, scale: float = 1.0) -> Tensor:
        recent = Recent().choose(scores, num_past_blocks, num_chosen - 1)
        sink = torch.zeros_like(num_past_blocks).masked_fill_(num_past_blocks < 1, -1)
        return torch.cat([sink.unsqueeze(-1), recent.masked_fill_(recent == 0, -1)], dim=-1)


TOP_K, RECENT, SINK_RECENT = TopK(), Recent(), SinkAndRecent()
