"""The public operator: MoBA attention and its selection (MoBA report, arXiv 2502.13189, section 2.2).

Two steps, whatever the backend: select past blocks for every query and head (no gradient), then attend the selected
blocks and, causally, the query's own. docs/semantics.md tells what is computed in each edge case.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moba_megatron.ops.adapters import flash_moba_attention
from moba_megatron.ops.backends import resolve_backend
from moba_megatron.ops.dense import full_attention
from moba_megatron.ops.dense_loss import dense_loss
from moba_megatron.ops.kept_layouts import layout_of
from moba_megatron.ops.layout import check_inputs, check_settings
from moba_megatron.ops.library import check_traced, is_traced, traced_attention
from moba_megatron.ops.precision import without_autocast
from moba_megatron.ops.reference import reference_attend, reference_router_loss, reference_select
from moba_megatron.ops.router import Router, RouterLoss, check_router, check_router_backend, for_heads, no_loss
from moba_megatron.ops.router_loss import learning_attention
from moba_megatron.ops.selection import Selection
from moba_megatron.ops.steps import check_workspace, steps_of

_logger = logging.getLogger("moba_megatron.ops")


@functools.cache
def _say_once(message: str) -> None:
    _logger.info(message)


@without_autocast
def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    block_size: int,
    top_k: int | Sequence[int],
    softmax_scale: float | None = None,
    backend: str = "auto",
    max_seqlen: int | None = None,
    selector: str = "top_k",
    summary: str = "mean",
    threshold: float | None = None,
    share_selection: str = "none",
    workspace_bytes: int | None = None,
    router: Router | None = None,
) -> Tensor | tuple[Tensor, RouterLoss]:
    """Mixture of Block Attention over a pack of documents.

    Every query attends its own block causally and, of the complete blocks before it in its document, the `top_k` - 1
    whose mean key has the largest inner product with it. Differentiable in q, k and v; selection is a constant.

    Args:
        q: queries [T, N, D] after rotary embedding; floating.
        k, v: keys and values [T, G, D], same dtype and device; N a multiple of G.
        cu_seqlens: int32 [documents + 1] on q's device, boundaries from 0 to T in tokens; None for one document.
        block_size: tokens per block.
        top_k: blocks per query, its own counted; a list has one K for each key head, that of its query heads.
        softmax_scale: factor on the scores of the softmax, 1/sqrt(D) if None. Selection does not depend on it.
        backend: `auto`, `reference`, `gathered`, `triton` or `flash_moba`. `auto` takes full causal attention where it
            is the same: where top_k blocks (the fewest of any head) cover the longest document.
        max_seqlen: an upper bound on the longest document in tokens; spares reading cu_seqlens on an accelerator.
        selector: how past blocks are chosen: `top_k` as above, `recent`, `sink_recent` or `threshold`; see
            `ops.selection`.
        summary: what scores are taken against, `mean` as above or `min_max`.
        threshold: for the selector `threshold`, a share of the scores' softmax.
        share_selection: with `mean` or `max` the query heads of a key head choose the same blocks, by the mean or the
            largest of their scores; `none` for each its own.
        workspace_bytes: room for what the sparse backends keep of the attention of past blocks until it is combined;
            work is cut by kv heads and ranges of tokens to fit, down to one token. An *entry*, one (query, head, past
            block), takes with `triton` D e + 12 bytes forward and D (e + 2) + 8 backward (e bytes of an element; what
            comes beside it: `ops.triton.attention`), with `gathered` D e + 40. None: `triton` takes q's size,
            at least 2 GiB, `gathered` what two entries for each query row of one kv head need. Other backends
            refuse a number. The result is the same up to the rounding of sums.
        router: queries and keys that choose blocks instead of q and k, by top_k or threshold of means.

    Returns:
        [T, N, D] in q's dtype. Softmax and sums are in fp32 (fp64 for fp64 inputs), under autocast as well. With a
        router that has a loss: this and the loss.

    Raises:
        ValueError: inputs or settings that do not fit, or a backend that cannot run; the message names the values.

    >>> q, k, v = torch.randn(3, 8, 2, 4).unbind(0)
    >>> moba_attention(q, k, v, torch.tensor([0, 5, 8], dtype=torch.int32), block_size=2, top_k=2).shape
    torch.Size([8, 2, 4])
    """
    top_k, selection = Selection(selector, summary, threshold, share_selection).with_blocks(top_k)
    check_settings(block_size, top_k, workspace_bytes)
    name, _ = resolve_backend(backend, q.device, q.dtype)
    check_workspace(name, workspace_bytes)
    traced = is_traced(q, name)
    # A tracer does not know the boundaries' values; the operators check them when they run.
    check_inputs({"q": q, "k": k, "v": v}, None if traced else cu_seqlens)
    selection.with_blocks(top_k, k.shape[1])
    learns = router is not None and router.learns
    learns_sparsely = learns and router.loss == "sparse"
    if router is not None:
        check_router(router, q, k.shape[1], selection)
        check_router_backend(router, name)
    if q.shape[0] == 0:
        # No rows, but the graph stays connected.
        out = q + (k.sum() + v.sum()).to(q.dtype)
        return (out, no_loss(router)) if learns else out
    scale = 1 / math.sqrt(q.shape[2]) if softmax_scale is None else float(softmax_scale)
    chooses_q, chooses_k = (q, k) if router is None else (router.q, router.k)
    if name == "reference":
        num_past = min(top_k, -(-q.shape[0] // block_size)) - 1
        ids = reference_select(chooses_q, chooses_k, cu_seqlens, block_size, num_past, selection)
        out = reference_attend(q, k, v, for_heads(ids, q.shape[1]), cu_seqlens, block_size, scale)[0]
        return (out, reference_router_loss(router, q, k, ids, cu_seqlens, block_size, scale)) if learns else out
    if name == "flash_moba":
        return flash_moba_attention(
            q, k, v, cu_seqlens, block_size=block_size, top_k=top_k, softmax_scale=softmax_scale, max_seqlen=max_seqlen,
            selection=selection,
        )  # fmt: skip
    full_if_covered = backend == "auto" and selection.fills_up and not learns_sparsely
    if traced:
        check_traced(router)
        if full_if_covered and cu_seqlens is None and selection.fewest_blocks(top_k) * block_size >= q.shape[0]:
            return full_attention(q, k, v, softmax_scale=scale)
        return traced_attention(
            q, k, v, cu_seqlens, block_size=block_size, top_k=top_k, softmax_scale=scale, max_seqlen=max_seqlen,
            backend=name, selection=selection, workspace_bytes=workspace_bytes, router=router,
        )  # fmt: skip
    layout = layout_of(q, cu_seqlens, block_size, max_seqlen)
    if full_if_covered and selection.fewest_blocks(top_k) >= layout.max_blocks:
        _say_once(
            f"auto: full causal attention where top_k = {top_k} blocks of {block_size} tokens cover every document"
        )
        out = full_attention(q, k, v, cu_seqlens, softmax_scale=scale, max_seqlen=max_seqlen)
        return (out, dense_loss(router, q, k, layout, scale)) if learns else out
    steps = steps_of(name, selection)
    num_past = min(top_k, layout.max_blocks) - 1
    summaries = steps.summarize(chooses_k, layout)
    ids = steps.select_past(chooses_q, summaries, layout, num_past)
    if learns_sparsely:
        return learning_attention(steps, router, q, k, v, ids, summaries, layout, scale, workspace_bytes)
    out = steps.attend(q, k, v, for_heads(ids, q.shape[1]), layout, scale, workspace_bytes)[0]
    return (out, dense_loss(router, q, k, layout, scale)) if learns else out


@torch.no_grad()
@without_autocast
def select_blocks(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    block_size: int,
    top_k: int | Sequence[int],
    max_seqlen: int | None = None,
    selector: str = "top_k",
    summary: str = "mean",
    threshold: float | None = None,
    share_selection: str = "none",
    router: Router | None = None,
) -> Tensor:
    """The blocks that `moba_attention` attends for every query and head.

    Args: as for `moba_attention`.

    Returns:
        int32 [T, N, top_k], the largest K where heads differ: block numbers within the query's document, its own block
        first, then past blocks by falling score, equal scores by lower number, -1 where there are fewer. Without
        scores: the document's first block, if the selector names it, and then the nearest first.

    Raises:
        ValueError: as `moba_attention`.

    The last query below likes the third block (mean 5) better than the first (1) and the second (0):

    >>> keys = torch.tensor([1.0, 1.0, 0.0, 0.0, 4.0, 6.0, 0.0]).view(7, 1, 1)
    >>> select_blocks(torch.ones(7, 1, 1), keys, block_size=2, top_k=3)[-1, 0].tolist()
    [3, 2, 0]
    """
    top_k, selection = Selection(selector, summary, threshold, share_selection).with_blocks(top_k)
    check_settings(block_size, top_k)
    check_inputs({"q": q, "k": k}, cu_seqlens)
    selection.with_blocks(top_k, k.shape[1])
    layout = layout_of(q, cu_seqlens, block_size, max_seqlen)
    own_TN1 = layout.block_T.to(torch.int32).view(-1, 1, 1).expand(-1, q.shape[1], 1)
    num_heads = q.shape[1]
    if router is not None:
        check_router(router, q, k.shape[1], selection)
        q, k = router.q, router.k
    steps = steps_of(resolve_backend("auto", q.device, q.dtype)[0], selection)
    ids = steps.select_past(q, steps.summarize(k, layout), layout, top_k - 1)
    return torch.cat([own_TN1, for_heads(ids, num_heads)], dim=-1)
