"""Routing: from queries and block summaries to the ids of the past blocks each query attends.

Scores (MoBA report, equation 6: the inner product of the query and the block's summary) are computed for one tile of
tokens and one kv head at a time and thrown away once the tile's ids are chosen, so that nothing of size T x M for all
heads ever lives in memory. A tile is scored only against the blocks between its first document's first block and its
own last one. Scores are in fp32, or fp64 for fp64 inputs. No gradient flows: selection is a constant.

Blocks with equal summaries must have equal scores, or chance would break their tie. A CPU's matrix products do not see
to that: the order in which they sum depends on the column. So where summaries repeat, each has the score of the first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moba_megatron.ops.layout import TokenBlocks
from moba_megatron.ops.precision import without_autocast
from moba_megatron.ops.selectors import TOP_K, Selector
from moba_megatron.ops.summaries import MEAN, Summary

# Scores held at once, and tokens. On a CPU scores should stay in a core's own cache, and few tokens see few blocks that
# they may not choose; an accelerator wants long launches.
SCORES_ON_CPU, TOKENS_ON_CPU = 2**19, 2**10
SCORES_ON_ACCELERATOR, TOKENS_ON_ACCELERATOR = 2**26, 2**12


def _repeated(summaries_MGD: Tensor) -> Tensor | None:
    """int64 [G, M]: numbers that are equal where summaries of a kv head are; None where one channel tells all apart,
    as it mostly does."""
    if summaries_MGD[..., 0].sort(dim=0).values.diff(dim=0).all():
        return None
    return torch.stack([x_MD.unique(dim=0, return_inverse=True)[1] for x_MD in summaries_MGD.unbind(1)])


def _first_with(number_C: Tensor) -> Tensor:
    """int64 [C]: for each column the first that has its number.

    >>> _first_with(torch.tensor([4, 0, 4, 1, 0])).tolist()
    [0, 1, 0, 3, 1]
    """
    columns = torch.arange(len(number_C))
    first = columns.new_full((int(number_C.max()) + 1,), len(columns)).scatter_reduce_(0, number_C, columns, "amin")
    return first[number_C]


def _shared(scores_TRC: Tensor, share_selection: str) -> Tensor:
    """Scores by which heads choose: their own [T, R, C], or [T, 1, C] where the R heads of a key head choose together.
    A mean is a sum in the order of the heads."""
    if share_selection == "none":
        return scores_TRC
    if share_selection == "max":
        return scores_TRC.amax(dim=1, keepdim=True)
    total = scores_TRC[:, :1]
    for head in range(1, scores_TRC.shape[1]):
        total = total + scores_TRC[:, head : head + 1]
    return total / scores_TRC.shape[1]


@torch.no_grad()
@without_autocast
def select_past(
    q_TND: Tensor,
    summaries_MGD: Tensor | None,
    layout: TokenBlocks,
    num_past: int,
    selector: Selector = TOP_K,
    summary: Summary | None = MEAN,
    share_selection: str = "none",
) -> Tensor:
    """Choose the past blocks of every query and head.

    Args:
        q_TND: queries [T, N, D].
        summaries_MGD: one summary per block of the pack and kv head, in the precision scores shall have; None for a
            selector that looks at no scores.
        layout: blocks of the queries' tokens, which are all tokens of the pack or some of them in rising order.
        num_past: K - 1, ids per query and head.
        selector: how to choose.
        summary: what the summaries are.
        share_selection: `none`, `mean` or `max`: whether the query heads of a key head choose together, see
            `ops.selection`.

    Returns:
        int32 [T, N, num_past], block numbers within the query's document in the selector's order, -1 where fewer.
    """
    num_tokens, num_heads, head_size = q_TND.shape
    ids_TNK = torch.full((num_tokens, num_heads, num_past), -1, dtype=torch.int32, device=q_TND.device)
    if num_past == 0 or num_tokens == 0:
        return ids_TNK
    if not selector.uses_scores:
        return ids_TNK.copy_(selector.choose(None, layout.block_T, num_past).unsqueeze(1))
    assert summaries_MGD is not None and summary is not None
    num_kv_heads = summaries_MGD.shape[1]
    qheads_per_kvhead = num_heads // num_kv_heads
    first_T, own_T = layout.first_block_T, layout.pack_block_T
    on_cpu = q_TND.device.type == "cpu"
    most = min(num_tokens, TOKENS_ON_CPU if on_cpu else TOKENS_ON_ACCELERATOR)
    budget = SCORES_ON_CPU if on_cpu else SCORES_ON_ACCELERATOR
    # The most blocks that `most` tokens in a row may choose from.
    seen = int((own_T[most - 1 :] - first_T[: num_tokens - most + 1]).max()) if on_cpu else layout.num_blocks
    step = max(1, min(most, budget // max(1, seen * qheads_per_kvhead)))
    planes_GDM = summaries_MGD.permute(1, 2, 0)
    repeated_GM = _repeated(summaries_MGD) if on_cpu else None
    for start in range(0, num_tokens, step):
        end = min(start + step, num_tokens)
        low, high = (int(first_T[start]), int(own_T[end - 1])) if on_cpu else (0, layout.num_blocks)
        if low == high:
            continue
        first, own = first_T[start:end], own_T[start:end]
        blocks = torch.arange(low, high, device=q_TND.device)
        refused = (blocks < first.unsqueeze(1)) | (blocks >= own.unsqueeze(1))
        for kv_head in range(num_kv_heads):
            heads = slice(kv_head * qheads_per_kvhead, (kv_head + 1) * qheads_per_kvhead)
            q = summary.queries(q_TND[start:end, heads].to(planes_GDM.dtype)).flatten(0, 1)
            scores = (q @ planes_GDM[kv_head, :, low:high]).view(end - start, qheads_per_kvhead, high - low)
            if repeated_GM is not None:
                scores = scores[..., _first_with(repeated_GM[kv_head, low:high])]
            scores = _shared(scores, share_selection).masked_fill_(refused.unsqueeze(1), -torch.inf)
            past = (own - first).unsqueeze(1).expand(-1, scores.shape[1])
            columns = selector.choose(scores, past, num_past, head_size**-0.5)
            shift = (first - low).view(-1, 1, 1)
            ids_TNK[start:end, heads] = torch.where(columns < 0, columns, columns - shift).to(torch.int32)
    return ids_TNK
