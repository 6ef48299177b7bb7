"""MoBA by its definition: a dense mask, in fp32 or wider. Slow, quadratic in memory, and meant to be obviously right.

It shares no code with the other backends. Each step is one line of the definition (MoBA report, equations 2 to 6):
documents are cut into blocks, a block's summary is the mean of its keys, complete past blocks are ranked by the query's
inner product with their summary (equal scores: the lower block first), and one softmax runs over the keys of the chosen
blocks and, up to the query itself, of its own block. Gradients are autograd's; selection is a constant. The variants of
the selection are defined here as well, each by what it means and not by how it is computed (`ops.selection`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moba_megatron.ops.selection import MOBA, Selection


def _documents(num_tokens: int, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    bounds = [0, num_tokens] if cu_seqlens is None else cu_seqlens.tolist()
    return list(zip(bounds, bounds[1:], strict=False))


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _scores(q: Tensor, past_keys: Tensor, summary: str) -> Tensor:
    """[t, n, blocks]: queries [t, n, D] against blocks of keys [blocks, B, n, D].

    Each score is a sum of its own over D, so that equal summaries have equal scores: in a matrix product the order of
    a sum depends on its column.
    """
    q, keys = q.unsqueeze(2), past_keys.transpose(0, 2)  # [t, n, 1, D] and [n, B, blocks, D]
    if summary == "mean":
        return (q * keys.mean(dim=1)).sum(dim=-1)
    return torch.maximum(q * keys.amin(dim=1), q * keys.amax(dim=1)).sum(dim=-1)


def _shared(scores: Tensor, num_kv_heads: int, how: str) -> Tensor:
    """Scores [t, n, blocks] with those of a key head's query heads replaced by their mean or maximum."""
    heads = scores.unflatten(1, (num_kv_heads, -1)).unbind(2)
    together = torch.stack(heads).amax(dim=0) if how == "max" else sum(heads[1:], heads[0]) / len(heads)
    return together.repeat_interleave(len(heads), dim=1)


def _ranking(q: Tensor, past_keys: Tensor, num_past: int, selection: Selection, num_kv_heads: int) -> Tensor:
    """[t, n, up to num_past]: ids of the chosen ones among all past blocks of keys [blocks, B, n, D], -1 for none."""
    blocks = past_keys.shape[0]
    if not selection.uses_scores:
        nearest = list(range(blocks - 1, -1, -1))
        if selection.selector == "sink_recent":
            nearest = [0, *nearest[:-1]]
        return torch.tensor(nearest[:num_past], device=q.device).expand(*q.shape[:2], -1)
    scores = _scores(q, past_keys, selection.summary)
    if selection.shared:
        scores = _shared(scores, num_kv_heads, selection.share_selection)
    scores, order = scores.sort(dim=-1, descending=True, stable=True)
    if selection.threshold is not None:
        shares = (scores / q.shape[2] ** 0.5).softmax(dim=-1)
        order = order.masked_fill(shares.cumsum(dim=-1) - shares >= selection.threshold, -1)
    return order[..., :num_past]


@torch.no_grad()
def reference_select(
    q: Tensor, k: Tensor, cu_seqlens: Tensor | None, block_size: int, num_past: int, selection: Selection = MOBA
) -> Tensor:
    """int32 [T, N, num_past]: past blocks by falling score, equal scores by lower number, -1 where fewer.

    Without scores: the first block, if the selection names it, and then the nearest block first.
    """
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    ids = torch.full((q.shape[0], num_heads, num_past), -1, dtype=torch.int32, device=q.device)
    for start, end in _documents(q.shape[0], cu_seqlens):
        for block in range(1, -(-(end - start) // block_size)):
            past_keys = _widen(k[start : start + block * block_size]).unflatten(0, (block, block_size))
            past_keys = past_keys.repeat_interleave(num_heads // num_kv_heads, dim=2)
            rows = slice(start + block * block_size, min(start + (block + 1) * block_size, end))
            ranking = _ranking(_widen(q[rows]), past_keys, num_past, selection, num_kv_heads)
            ids[rows, :, : ranking.shape[-1]] = ranking.to(torch.int32)
    if selection.budgets is not None:
        places, heads = torch.arange(num_past, device=ids.device), num_heads // num_kv_heads
        kept = torch.tensor(selection.budgets, device=ids.device).repeat_interleave(heads) - 1
        ids.masked_fill_(places >= kept[:, None], -1)
    return ids


def reference_attend(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor, cu_seqlens: Tensor | None, block_size: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention with given past block ids through a dense mask: out [T, N, D] in q's dtype, lse [T, N]."""
    repeat = q.shape[1] // k.shape[1]
    scores = torch.einsum("tnd,snd->nts", _widen(q), _widen(k).repeat_interleave(repeat, dim=1)) * softmax_scale
    allowed = torch.zeros(scores.shape, dtype=torch.bool, device=q.device)
    for start, end in _documents(q.shape[0], cu_seqlens):
        position = torch.arange(end - start, device=q.device)
        block = position // block_size
        own = (block[:, None] == block) & (position[:, None] >= position)
        chosen = (ids[start:end, :, :, None] == block).any(dim=2).transpose(0, 1)
        allowed[:, start:end, start:end] = own | chosen
    scores = scores.masked_fill(~allowed, -torch.inf)
    out = torch.einsum("nts,snd->tnd", scores.softmax(dim=-1), _widen(v).repeat_interleave(repeat, dim=1))
    return out.to(q.dtype), scores.logsumexp(dim=-1).t()
