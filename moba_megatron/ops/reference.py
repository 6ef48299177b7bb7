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

from moba_megatron.ops.router import Router, RouterLoss
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
        places, heads = torch.arange(num_past, device=ids.device), num_heads // len(selection.budgets)
        kept = torch.tensor(selection.budgets, device=ids.device).repeat_interleave(heads) - 1
        ids.masked_fill_(places >= kept[:, None], -1)
    return ids


def _attended_scores(
    q: Tensor, k: Tensor, ids: Tensor, cu_seqlens: Tensor | None, block_size: int, softmax_scale: float
) -> Tensor:
    """[N, T, T]: scaled scores, -inf where a query does not attend a key."""
    repeat = q.shape[1] // k.shape[1]
    scores = torch.einsum("tnd,snd->nts", _widen(q), _widen(k).repeat_interleave(repeat, dim=1)) * softmax_scale
    allowed = torch.zeros(scores.shape, dtype=torch.bool, device=q.device)
    for start, end in _documents(q.shape[0], cu_seqlens):
        position = torch.arange(end - start, device=q.device)
        block = position // block_size
        own = (block[:, None] == block) & (position[:, None] >= position)
        chosen = (ids[start:end, :, :, None] == block).any(dim=2).transpose(0, 1)
        allowed[:, start:end, start:end] = own | chosen
    return scores.masked_fill(~allowed, -torch.inf)


def reference_attend(
    q: Tensor, k: Tensor, v: Tensor, ids: Tensor, cu_seqlens: Tensor | None, block_size: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention with given past block ids through a dense mask: out [T, N, D] in q's dtype, lse [T, N]."""
    repeat = q.shape[1] // k.shape[1]
    scores = _attended_scores(q, k, ids, cu_seqlens, block_size, softmax_scale)
    out = torch.einsum("nts,snd->tnd", scores.softmax(dim=-1), _widen(v).repeat_interleave(repeat, dim=1))
    return out.to(q.dtype), scores.logsumexp(dim=-1).t()


def reference_router_loss(
    router: Router,
    q: Tensor,
    k: Tensor,
    ids: Tensor,
    cu_seqlens: Tensor | None,
    block_size: int,
    softmax_scale: float,
) -> RouterLoss:
    """A router's loss by its definition (`ops.router_loss`) for its choice `ids` [T, H, K]; gradients are autograd's.

    With the dense loss every past block counts as chosen, for the loss and in the attention that it is compared with.
    """
    num_tokens, num_heads, num_router_heads = q.shape[0], q.shape[1], router.q.shape[1]
    if router.loss == "dense":
        blocks = torch.arange(-(-num_tokens // block_size), dtype=ids.dtype, device=q.device)
        own = torch.cat([torch.arange(end - start) // block_size for start, end in _documents(num_tokens, cu_seqlens)])
        ids = torch.where(blocks < own.to(q.device)[:, None], blocks, -1)[:, None].expand(-1, num_router_heads, -1)
    of_heads = ids.repeat_interleave(num_heads // num_router_heads, dim=1)
    with torch.no_grad():
        shares = _attended_scores(q, k, of_heads, cu_seqlens, block_size, softmax_scale).softmax(dim=-1)
    router_k = _widen(router.k).repeat_interleave(num_router_heads // router.k.shape[1], dim=1)
    loss = 0 * (_widen(router.q).sum() + router_k.sum())  # connected, where no document has a past block
    entropy = tokens = torch.zeros_like(loss, requires_grad=False)
    for start, end in _documents(num_tokens, cu_seqlens):
        count = (end - start - 1) // block_size  # the last block is never past
        mask = torch.ones(end - start, device=q.device) if router.loss_mask is None else router.loss_mask[start:end]
        tokens = tokens + mask.sum()
        if count < 1:
            continue
        past = slice(start, start + count * block_size)
        mass = shares[:, start:end, past].unflatten(2, (count, block_size)).sum(dim=-1)
        mass = mass.unflatten(0, (num_router_heads, -1)).mean(dim=1)
        chosen = (ids[start:end, :, :, None] == torch.arange(count, device=q.device)).any(dim=2).transpose(0, 1)
        means = router_k[past].unflatten(0, (count, block_size)).mean(dim=1)
        z = torch.einsum("thc,mhc->htm", _widen(router.q[start:end]), means) / router.q.shape[2] ** 0.5
        mass = torch.where(chosen, mass, 0)
        p = mass / mass.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        # Rows without a chosen block have shares that nobody reads.
        log_pi = z.masked_fill(~chosen & chosen.any(dim=-1, keepdim=True), -torch.inf).log_softmax(dim=-1)
        log_pi = torch.where(chosen, log_pi, 0)
        counts = (chosen.sum(dim=-1) > 1) & (mass.sum(dim=-1) > 1e-20)
        of_row = torch.where(counts, (torch.xlogy(p, p) - p * log_pi).sum(dim=-1), 0)
        loss = loss + (of_row.mean(dim=0) * mask).sum()
        entropy = entropy - ((torch.where(chosen, log_pi.exp(), 0) * log_pi).sum(dim=-1).mean(dim=0) * mask).sum()
    return RouterLoss(loss, entropy.detach(), tokens)
