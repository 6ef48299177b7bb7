"""Counts of a layer's choices: how far away they are and how even over the blocks, over all queries that have a choice.

A query has a choice if its document has more complete blocks before its own than it may choose. Other queries take all
of them, which says nothing about the routing, so every count leaves them out.

More queries can choose early blocks than late ones, so even random choices fill blocks unevenly. Evenness is therefore
measured relative to an *even router*: each query spreads its K - 1 choices equally over the blocks before its own.

Legend: T tokens of the pack, N heads, K blocks a query, M blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from moba_megatron.evaluation.routing.capture import Captured
from moba_megatron.ops import select_blocks
from moba_megatron.ops.layout import block_layout


@dataclass
class DocumentChoices:
    """Choices of the candidate blocks of one document: `chosen` [N, candidates], and `even` [candidates], what an even
    router is expected to choose."""

    chosen: Tensor
    even: Tensor


@dataclass
class SelectionCounts:
    """Counts of one layer, added up over batches; fp64 tensors with one row a head.

    Attributes:
        queries, with_choice: queries that counted documents have, and those of them that had a choice.
        chosen_at, offered_at: [N, distances] and [distances]: how often the block at distance 1, 2, ... before the
            query's own was chosen, and by how many queries it could have been.
        documents: for each document with choices, those of its candidate blocks.
    """

    queries: int = 0
    with_choice: int = 0
    chosen_at: Tensor = field(default_factory=lambda: torch.zeros(1, 0, dtype=torch.float64))
    offered_at: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    documents: list[DocumentChoices] = field(default_factory=list)

    def distance_shares(self) -> Tensor:
        """[N, distances]: of the queries that could choose the block at a distance, the share that did."""
        return self.chosen_at / self.offered_at.clamp(min=1)

    def entropy(self) -> Tensor:
        """[N]: entropy of the choices over a document's candidate blocks, over that of an even router: 1 is as even, 0
        is one block for all; above 1 where later blocks make up for being offered less. Mean over documents, by their
        choices; NaN without a document."""
        return self._mean([_entropy(one.chosen) / _entropy(one.even[None]) for one in self.documents])

    def coverage(self) -> Tensor:
        """[N]: share of the candidate blocks that any query chose, by head."""
        return self._mean([(one.chosen > 0).double().mean(dim=1) for one in self.documents])

    def hottest_load(self) -> Tensor:
        """[N]: the most chosen block's share of the choices, over that of an even router's most chosen one: 1 is as
        even."""
        return self._mean([_largest_share(one.chosen) / _largest_share(one.even[None]) for one in self.documents])

    def _mean(self, values: list[Tensor]) -> Tensor:
        weights = torch.tensor([float(one.chosen.sum()) for one in self.documents], dtype=torch.float64)
        if not values:
            return torch.full((self.chosen_at.shape[0],), torch.nan, dtype=torch.float64)
        return (torch.stack(values) * weights[:, None]).sum(dim=0) / weights.sum()


def count_selection(seen: Captured, counted: Tensor, counts: SelectionCounts, most: int | None = None) -> Tensor:
    """Add what the queries of one batch choose.

    Args:
        counted: bool [T], tokens of documents that count (padding does not).
        counts: changed in place.
        most: the largest K of any head of the layer, where these are some of them.

    Returns:
        int64, rising: positions of the queries that had a choice.
    """
    block_size, top_k = seen.attention.block_size, most or seen.attention.top_k
    selection = seen.attention.selection
    settings = {"top_k": seen.attention.blocks, **selection.settings, "router": seen.chooser(selection)}
    layout = block_layout(seen.q.shape[0], block_size, seen.cu_seqlens, device=seen.q.device)
    ids_TNK = select_blocks(seen.q, seen.k, seen.cu_seqlens, block_size=block_size, **settings)[..., 1:]
    queries = torch.nonzero(counted & (layout.block_T >= top_k)).flatten()
    counts.queries += int(counted.sum())
    counts.with_choice += len(queries)
    own = layout.block_T[queries]
    _add_distances(counts, ids_TNK[queries], own)
    bounds = layout.cu_seqlens.tolist()
    for first, end in pairwise(bounds):
        here = (queries >= first) & (queries < end)
        if here.any():
            chosen = _choices_by_block(ids_TNK[queries[here]], int(own[here].max()))
            counts.documents.append(DocumentChoices(chosen, even_choices(own[here], top_k)))
    return queries


def added(parts: list[SelectionCounts]) -> SelectionCounts:
    """The counts of several parts, of the same heads, as of one."""
    longest = max(part.offered_at.numel() for part in parts)

    def sum_of(tables: list[Tensor]) -> Tensor:
        padded = [torch.nn.functional.pad(table, (0, longest - table.shape[-1])) for table in tables]
        return torch.stack(padded).sum(dim=0)

    return SelectionCounts(
        sum(part.queries for part in parts),
        sum(part.with_choice for part in parts),
        sum_of([part.chosen_at for part in parts]),
        sum_of([part.offered_at for part in parts]),
        [document for part in parts for document in part.documents],
    )


def _add_distances(counts: SelectionCounts, ids_QNK: Tensor, own_Q: Tensor) -> None:
    """Choices and offers by distance; the tables grow to the longest distance seen."""
    longest = max(counts.offered_at.numel(), int(own_Q.max()) if own_Q.numel() else 0)
    heads = ids_QNK.shape[1]
    chosen, offered = counts.chosen_at.new_zeros(heads, longest), counts.offered_at.new_zeros(longest)
    chosen[:, : counts.chosen_at.shape[1]] += counts.chosen_at
    offered[: counts.offered_at.numel()] += counts.offered_at
    distance = own_Q.view(-1, 1, 1) - ids_QNK - 1
    for head in range(heads):
        found = distance[:, head][ids_QNK[:, head] >= 0]
        chosen[head] += torch.bincount(found, minlength=longest).cpu()
    # A query in block b has the distances 1 to b.
    starts = torch.bincount(own_Q, minlength=longest + 1).cpu().double()
    offered += starts.flip(0).cumsum(0).flip(0)[1 : longest + 1]
    counts.chosen_at, counts.offered_at = chosen, offered


def _choices_by_block(ids_QNK: Tensor, candidates: int) -> Tensor:
    """[N, candidates]: how often each block of a document was chosen."""
    by_head = ids_QNK.transpose(0, 1).flatten(1).long()
    return torch.stack([torch.bincount(ids[ids >= 0], minlength=candidates).cpu().double() for ids in by_head])


def even_choices(own_Q: Tensor, top_k: int) -> Tensor:
    """fp64 [candidates]: how often an even router is expected to choose each block of a document.

    Args:
        own_Q: the block of each query that has a choice.

    >>> even_choices(torch.tensor([2, 2, 4]), top_k=2).tolist()
    [1.25, 1.25, 0.25, 0.25]
    """
    # Queries of block b give (K - 1) / b to each block before it.
    queries = torch.bincount(own_Q).cpu().double()
    each = (top_k - 1) * queries / torch.arange(queries.numel(), dtype=torch.float64).clamp(min=1)
    return each[1:].flip(0).cumsum(0).flip(0)


def _largest_share(counts_NM: Tensor) -> Tensor:
    return counts_NM.amax(dim=1) / counts_NM.sum(dim=1).clamp(min=1e-9)


def _entropy(counts_NM: Tensor) -> Tensor:
    shares = counts_NM / counts_NM.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.special.entr(shares).sum(dim=1)
