"""Continuing a text: attention of its newest tokens to all of its keys, in portable PyTorch.

This is what generation needs: one new token (decoding) or many (more of a long prompt) attend to keys and values that
lie in a cache. The result is exactly what one pass over the whole text gives for these tokens: past blocks are
complete, a query's own block is attended as far as it is filled, and a short last block is never a candidate.

Few queries: each chooses its blocks by the cached summaries, and for each kv head the blocks that its query heads chose
are copied out and attended at once; a step touches the summaries and K blocks per head, however long the text is.

Many queries: the work is laid out as fragments (see `fragments`). The new tokens are cut at the end of the block that
the first of them continues, into one or two spans. A span attends itself in causal spans, then the chosen ones of the
complete blocks before it, and the first span what the cache holds of its own block. Keys and values are read where they
lie, one kv head at a time, so that memory depends on the new tokens and not on those before them.

Full attention is the same with one block as long as the text.

Legend: S tokens of the text, t of them new, N query heads, G kv heads, D head size, B block size, K past blocks per
query, M complete blocks of the text, n query heads of a kv head, U blocks that they chose.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moba_megatron.ops.fragments import Fragment, Keys
from moba_megatron.ops.gathered.attention import accumulate
from moba_megatron.ops.gathered.routing import select_past
from moba_megatron.ops.layout import TokenBlocks, check_settings
from moba_megatron.ops.precision import score_dtype, without_autocast
from moba_megatron.ops.router import Router, check_router, for_heads
from moba_megatron.ops.selection import MOBA, Selection
from moba_megatron.ops.summaries import MEAN

# Up to so many new tokens are taken one by one. Above, sharing blocks among them pays for sorting them by block.
ONE_BY_ONE = 8
# Keys that are taken at a time of a block that was begun before the new tokens, and so is attended whole: a tile has
# scores of them all.
LONGEST_PART = 2**14


@torch.no_grad()
def block_means(k_SGD: Tensor, block_size: int, first_block: int = 0) -> Tensor:
    """Summaries of a text's complete blocks.

    Args:
        k_SGD: keys [S, G, D] of the whole text.
        block_size: B.
        first_block: earlier blocks are left out.

    Returns:
        [M - first_block, G, D] in fp32 or wider.

    >>> block_means(torch.tensor([1.0, 3.0, 10.0, 20.0, 7.0]).view(5, 1, 1), 2).flatten().tolist()
    [2.0, 15.0]
    """
    blocks = k_SGD.shape[0] // block_size
    keys = k_SGD[first_block * block_size : blocks * block_size].unflatten(0, (blocks - first_block, block_size))
    return keys.to(score_dtype(k_SGD.dtype)).mean(dim=1)


@torch.no_grad()
def block_summaries(k_SGD: Tensor, block_size: int, first_block: int = 0, selection: Selection = MOBA) -> Tensor:
    """What a text's complete blocks show of their keys to a selection that looks at scores.

    Args: as for `block_means`, which this is where the summary is the mean.

    Returns:
        [M - first_block, G, what the summary has for a block: D, or 2 D for `min_max`] in fp32 or wider.
    """
    summary = selection.make_summary()
    assert summary is not None, selection
    if summary is MEAN:
        return block_means(k_SGD, block_size, first_block)
    blocks = k_SGD.shape[0] // block_size
    keys, count = k_SGD[first_block * block_size : blocks * block_size], max(0, blocks - first_block)
    if count == 0:
        width = summary.queries(k_SGD.new_empty(0, k_SGD.shape[2])).shape[-1]
        return k_SGD.new_empty(0, k_SGD.shape[1], width, dtype=score_dtype(k_SGD.dtype))
    lengths_M = torch.full((count,), block_size, device=k_SGD.device)
    block_T = torch.arange(count, device=k_SGD.device).repeat_interleave(block_size)
    return summary.finish(summary.partial(keys, block_T, count), lengths_M)


@torch.no_grad()
@without_autocast
def continue_text(
    q_tND: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    summaries_MGD: Tensor | None = None,
    *,
    block_size: int,
    top_k: int | Sequence[int],
    softmax_scale: float | None = None,
    selection: Selection = MOBA,
    router_q_tHC: Tensor | None = None,
    router_k_SJC: Tensor | None = None,
) -> Tensor:
    """MoBA for the newest tokens of one text; no gradient.

    Args:
        q_tND: queries [t, N, D] of the last t tokens.
        k_SGD, v_SGD: keys and values [S, G, D] of the whole text, the new tokens included; any strides, S >= t.
        summaries_MGD: of the text's complete blocks (`block_summaries`); made here if None and needed.
        block_size, top_k, softmax_scale: as for `moba_attention`; `block_size` >= S is full attention.
        selection: how past blocks are chosen.
        router_q_tHC, router_k_SJC: queries and keys of a router (`ops.router`) that choose in place of q and k, of the
            same tokens: [t, H, C] and [S, J, C]. The summaries are then those of the router's keys, which may be left
            out beside them.

    Returns:
        [t, N, D] in q's dtype.

    Raises:
        ValueError: settings or shapes that do not fit.

    >>> q, k, v = torch.randn(3, 9, 2, 4).unbind(0)
    >>> continue_text(q[-1:], k, v, block_size=2, top_k=2).shape
    torch.Size([1, 2, 4])
    """
    top_k, selection = selection.with_blocks(top_k)
    check_settings(block_size, top_k)
    _check_shapes(q_tND, k_SGD, v_SGD)
    chooses_q, chooses_k = choosing(q_tND, k_SGD, summaries_MGD, selection, router_q_tHC, router_k_SJC)
    selection.with_blocks(top_k, k_SGD.shape[1])
    new, length = q_tND.shape[0], k_SGD.shape[0]
    scale = 1 / math.sqrt(q_tND.shape[2]) if softmax_scale is None else softmax_scale
    num_past = min(top_k - 1, length // block_size)
    if not selection.uses_scores:
        summaries_MGD = None
    elif summaries_MGD is None and num_past:
        summaries_MGD = block_summaries(chooses_k, block_size, selection=selection)
    blocks_t = torch.arange(length - new, length, device=q_tND.device) // block_size
    known = length // block_size if summaries_MGD is None else summaries_MGD.shape[0]
    layout = TokenBlocks(known, blocks_t, torch.zeros_like(blocks_t))
    chosen = selection.make_selector(), selection.make_summary(), selection.share_selection
    ids_tHK = selection.within_budgets(select_past(chooses_q, summaries_MGD, layout, num_past, *chosen))
    ids_tNK = for_heads(ids_tHK, q_tND.shape[1])
    if new <= ONE_BY_ONE:
        out = [
            _attend_newest(q_tND[at], k_SGD[:end], v_SGD[:end], ids_tNK[at], block_size, scale)
            for at, end in enumerate(range(length - new + 1, length + 1))
        ]
        return torch.stack(out)
    # Where the block ends that the first new token lies in.
    cut = min(-(-(length - new) // block_size) * block_size, length)
    bounds = sorted({length - new, cut, length})
    first = length - new
    out = [
        _attend_span(
            q_tND[start - first : end - first],
            k_SGD,
            v_SGD,
            ids_tNK[start - first : end - first],
            (start, end),
            block_size,
            scale,
        )
        for start, end in itertools.pairwise(bounds)
    ]
    return torch.cat(out)


def choosing(
    q_tND: Tensor,
    k_SGD: Tensor,
    summaries_MGD: Tensor | None,
    selection: Selection,
    router_q_tHC: Tensor | None,
    router_k_SJC: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The queries that choose, and the keys that summaries are made of: attention's or a router's.

    Raises:
        ValueError: a router without keys and summaries, or one that does not fit the attention.
    """
    if router_q_tHC is None:
        if router_k_SJC is not None:
            raise ValueError("a router's keys without its queries: give both")
        return q_tND, k_SGD
    if router_k_SJC is not None and router_k_SJC.shape[0] != k_SGD.shape[0]:
        raise ValueError(f"a router's keys of {router_k_SJC.shape[0]} tokens for a text of {k_SGD.shape[0]}")
    if router_k_SJC is not None:
        like = router_k_SJC
    elif summaries_MGD is not None:
        # They stand for the keys: as many heads of the same size.
        like = summaries_MGD.to(q_tND.dtype)
    else:
        raise ValueError("a router's queries without its keys or their summaries: give one of these")
    new = like.new_empty(len(q_tND), *like.shape[1:])
    check_router(Router(router_q_tHC, new), q_tND, k_SGD.shape[1], selection)
    return router_q_tHC, k_SGD if router_k_SJC is None else router_k_SJC


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = k.shape == v.shape and q.dim() == k.dim() == 3 and q.shape[2] == k.shape[2] and q.shape[1] % k.shape[1] == 0
    if not fits or not 0 < q.shape[0] <= k.shape[0]:
        raise ValueError(
            "q [t, N, D], k and v [S, G, D] must agree in D and in S, with 0 < t <= S and N a multiple of G, got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )


def _attend_newest(q_ND: Tensor, k_SGD: Tensor, v_SGD: Tensor, ids_NK: Tensor, block_size: int, scale: float) -> Tensor:
    """The last token of a text over given past blocks and its own block: [N, D]."""
    length, num_kv_heads, _ = k_SGD.shape
    own = (length - 1) // block_size
    start, dtype = own * block_size, score_dtype(q_ND.dtype)
    out = []
    for kv_head, (q_nD, ids_nK) in enumerate(zip(q_ND.chunk(num_kv_heads), ids_NK.chunk(num_kv_heads), strict=True)):
        chosen_U = ids_nK.unique()
        chosen_U = chosen_U[chosen_U >= 0]
        k_UBD, v_UBD = (
            x[:start, kv_head].unflatten(0, (own, block_size)).index_select(0, chosen_U).to(dtype) if own else None
            for x in (k_SGD, v_SGD)
        )
        own_k, own_v = (x[start:, kv_head].to(dtype) for x in (k_SGD, v_SGD))
        q_nD = q_nD.to(dtype) * scale
        own_s = q_nD @ own_k.T
        if own:
            past_s = torch.einsum("nd,ubd->nub", q_nD, k_UBD)
            chosen_nU = (ids_nK.unsqueeze(-1) == chosen_U).any(dim=1)
            past_s.masked_fill_(~chosen_nU.unsqueeze(-1), -torch.inf)
            p = torch.cat([past_s.flatten(1), own_s], dim=-1).softmax(dim=-1)
            past_p, own_p = p.split([past_s[0].numel(), own_s.shape[1]], dim=-1)
            out.append(past_p @ v_UBD.flatten(0, 1) + own_p @ own_v)
        else:
            out.append(own_s.softmax(dim=-1) @ own_v)
    return torch.cat(out).to(q_ND.dtype)


def _attend_span(
    q_tND: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    ids_tNK: Tensor,
    span: tuple[int, int],
    block_size: int,
    scale: float,
) -> Tensor:
    """A span of tokens (start, end) of a text that lies in one block, or that begins with a block: [t, N, D]."""
    start, end = span
    own, dtype = start // block_size, score_dtype(q_tND.dtype)
    out = torch.empty(q_tND.shape, dtype=dtype, device=q_tND.device)
    lse = torch.empty(q_tND.shape[:2], dtype=dtype, device=q_tND.device)
    q_tND = q_tND.contiguous()
    # Tokens attend themselves first; later parts are added to that.
    full, tail = (0, end - start) if start % block_size else divmod(end - start, block_size)
    causal_spans = [(0, full, block_size)] * (full > 0) + [(end - start - tail, 1, tail)] * (tail > 0)
    chosen = own > 0 and ids_tNK.shape[2] > 0
    parts = [(slice(start, end), _chosen(ids_tNK, own + full, own, full, block_size, causal_spans))]
    parts += [(slice(0, own * block_size), _chosen(ids_tNK, own + full, 0, own, block_size, []))] * chosen
    parts += [
        (slice(first, last), _before(q_tND, last - first))
        for first in range(own * block_size, start, LONGEST_PART)
        for last in (min(first + LONGEST_PART, start),)
    ]
    qheads_per_kvhead = q_tND.shape[1] // k_SGD.shape[1]
    for kv_head in range(k_SGD.shape[1]):
        for rows, fragment in parts:
            # One kv head of a cache lies dense already: nothing is copied.
            k, v = (x[rows, kv_head : kv_head + 1] for x in (k_SGD, v_SGD))
            keys = Keys(k, v, qheads_per_kvhead, first_kv_head=kv_head)
            ids = ids_tNK if fragment.own_kv_block_T is None and fragment.kv_blocks else ids_tNK[..., :0]
            accumulate(q_tND, keys, ids, fragment, scale, out, lse)
    return out.to(q_tND.dtype)


def _chosen(
    ids_tNK: Tensor, known: int, first: int, count: int, block_size: int, causal_spans: list[tuple[int, int, int]]
) -> Fragment:
    """`count` of the text's `known` blocks from block `first` on, which lie at the beginning of the keys at hand: those
    of them that the ids name."""
    device = ids_tNK.device
    kv_block_of_block = torch.full((known + 1,), -1, dtype=torch.int32, device=device)
    kv_block_of_block[first : first + count] = torch.arange(count, dtype=torch.int32, device=device)
    blocks = [(block * block_size, (block + 1) * block_size) for block in range(count)]
    return Fragment(
        blocks,
        causal_spans,
        first_block_T=torch.zeros(ids_tNK.shape[0], dtype=torch.int64, device=device),
        kv_block_of_block=kv_block_of_block,
    )


def _before(q_tND: Tensor, length: int) -> Fragment:
    """Keys of the tokens' own block, all of which lie before them."""
    return Fragment(
        [(0, length)], [], own_kv_block_T=torch.zeros(q_tND.shape[0], dtype=torch.int32, device=q_tND.device)
    )
