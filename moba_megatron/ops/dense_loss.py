"""The dense loss of a router: as `ops.router_loss`, but over all past blocks, compared with full causal attention.

Use it to warm up a router: the sparse loss sees only blocks that the router has chosen. The shares of full attention
are computed by plain products, for some rows of one key head at a time, and not kept; nor are the scores of the router.
Time is quadratic in the length of a document, memory is not. The gradients of router queries and summaries are computed
in the forward pass and kept: 4 bytes x T H C and M J C.

Boundaries are read on the host. Legend: as in `ops.router_loss`; S keys of a document up to a tile's last row, P past
blocks of its last row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moba_megatron.ops.layout import BlockLayout
from moba_megatron.ops.precision import score_dtype, without_autocast
from moba_megatron.ops.router import Router, RouterLoss, counted_tokens, no_loss
from moba_megatron.ops.router_loss import loss_and_entropy, mask_of, spread_to_keys, target_and_shares
from moba_megatron.ops.summaries import MEAN

# Scores of attention held at once.
SCORES_ON_CPU, SCORES_ON_ACCELERATOR = 2**20, 2**26


def dense_loss(
    router: Router,
    q_TND: Tensor,
    k_TGD: Tensor,
    layout: BlockLayout,
    softmax_scale: float,
    all_router_heads: int | None = None,
) -> RouterLoss:
    """The dense loss of a whole pack.

    Args:
        router: [T, H, C] and [T, J, C], H of G or N.
        q_TND, k_TGD: the attention's queries and keys; no gradient reaches them.
        softmax_scale: factor on the attention's scores.
        all_router_heads: router heads over which a token's loss is a mean, where these are some of them; None: H.

    Returns:
        Sums over the tokens. The gradient reaches `router.q` and `router.k`.
    """
    if router.q.shape[0] == 0 or layout.max_blocks < 2:
        return no_loss(router)
    heads = all_router_heads or router.q.shape[1]
    loss, entropy = _DenseLoss.apply(
        router.q, router.k, q_TND.detach(), k_TGD.detach(), layout, softmax_scale, router.loss_mask, heads
    )
    return RouterLoss(loss, entropy, counted_tokens(router).to(loss.dtype))


class _DenseLoss(torch.autograd.Function):
    """Saved for backward: the gradients of the router's queries and summaries."""

    @staticmethod
    @without_autocast
    def forward(
        ctx,
        q_THC: Tensor,
        k_TJC: Tensor,
        attention_q_TND: Tensor,
        attention_k_TGD: Tensor,
        layout: BlockLayout,
        softmax_scale: float,
        mask_T: Tensor | None,
        all_heads: int,
    ) -> tuple[Tensor, Tensor]:
        dtype, num_kv_heads = score_dtype(q_THC.dtype), attention_k_TGD.shape[1]
        means_MJC = MEAN.finish(MEAN.partial(k_TJC, layout.pack_block_T, layout.num_blocks), layout.block_lengths())
        dq_THC, db_MJC = torch.zeros_like(q_THC, dtype=dtype), torch.zeros_like(means_MJC)
        sums = torch.zeros(2, dtype=torch.float64, device=q_THC.device)
        scale, heads = q_THC.shape[2] ** -0.5, q_THC.shape[1] // num_kv_heads
        for tile in _tiles(layout, attention_q_TND.shape[1] // num_kv_heads):
            mask_t11 = mask_of(mask_T, tile.rows, dtype)
            for kv_head in range(num_kv_heads):
                shares_tRP = _past_shares(attention_q_TND, attention_k_TGD, kv_head, tile, softmax_scale, dtype)
                masses_thP = shares_tRP.unflatten(1, (heads, -1)).mean(dim=2)
                mine = slice(kv_head * heads, (kv_head + 1) * heads)
                key_head = kv_head * k_TJC.shape[1] // num_kv_heads
                q_thC, b_PC = q_THC[tile.rows, mine].to(dtype), means_MJC[tile.blocks, key_head]
                z_thP = (q_thC @ b_PC.t()) * scale
                p, log_pi, counts_th = target_and_shares(masses_thP, z_thP, tile.past_t1P.expand_as(z_thP))
                dz_thP = (log_pi.exp() - p).masked_fill_(~(tile.past_t1P & counts_th.unsqueeze(-1)), 0)
                dz_thP *= scale / all_heads if mask_t11 is None else mask_t11 * (scale / all_heads)
                dq_THC[tile.rows, mine] = dz_thP @ b_PC
                db_MJC[tile.blocks, key_head] += dz_thP.flatten(0, 1).t() @ q_thC.flatten(0, 1)
                sums += loss_and_entropy(p, log_pi, counts_th, mask_t11)
        ctx.save_for_backward(dq_THC, db_MJC)
        ctx.layout, ctx.dtypes = layout, (q_THC.dtype, k_TJC.dtype)
        loss, entropy = (x.clone() for x in (sums / all_heads).to(dtype).unbind(0))
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor, _):
        dq_THC, db_MJC = (x * dloss.to(x.dtype) for x in ctx.saved_tensors)
        dk_TJC = spread_to_keys(db_MJC, ctx.layout, ctx.layout.block_lengths(), None)
        return dq_THC.to(ctx.dtypes[0]), dk_TJC.to(ctx.dtypes[1]), *[None] * 6


class _Tile:
    """Adjacent rows of one document, the last of which has P past blocks, at least 1.

    Args:
        start: first row of the document.
        rows: these rows, as a slice of the pack.
        first_block: number of the document's first block in the pack.
    """

    def __init__(self, start: int, rows: slice, first_block: int, block_size: int, device: torch.device):
        self.rows, self.keys = rows, slice(start, rows.stop)
        self.block_size = block_size
        self.num_past = (rows.stop - 1 - start) // block_size
        self.blocks = slice(first_block, first_block + self.num_past)
        rows_t = torch.arange(rows.start, rows.stop, device=device)
        past_tP = torch.arange(self.num_past, device=device) < ((rows_t - start) // block_size).unsqueeze(1)
        self.past_t1P = past_tP.unsqueeze(1)
        self.future_tS = torch.arange(start, rows.stop, device=device) > rows_t.unsqueeze(1)


def _tiles(layout: BlockLayout, qheads_per_kvhead: int) -> Iterator[_Tile]:
    """The rows of all documents that have a past block."""
    device = layout.cu_seqlens.device
    most = SCORES_ON_CPU if device.type == "cpu" else SCORES_ON_ACCELERATOR
    bounds, first_blocks = layout.cu_seqlens.tolist(), layout.first_block.tolist()
    for start, end, first_block in zip(bounds, bounds[1:], first_blocks, strict=False):
        first = start + layout.block_size
        while first < end:
            last = min(end, first + max(1, most // (qheads_per_kvhead * (end - start))))
            yield _Tile(start, slice(first, last), first_block, layout.block_size, device)
            first = last


def _past_shares(
    q_TND: Tensor, k_TGD: Tensor, kv_head: int, tile: _Tile, softmax_scale: float, dtype: torch.dtype
) -> Tensor:
    """[t, R, P]: shares of full causal attention that past blocks get, by the query heads of a key head."""
    repeat = q_TND.shape[1] // k_TGD.shape[1]
    q_tRD = q_TND[tile.rows, kv_head * repeat : (kv_head + 1) * repeat].to(dtype) * softmax_scale
    s_tRS = (q_tRD @ k_TGD[tile.keys, kv_head].to(dtype).t()).masked_fill_(tile.future_tS.unsqueeze(1), -torch.inf)
    p_tRS = s_tRS.softmax(dim=-1)
    in_blocks = p_tRS[..., : tile.num_past * tile.block_size].unflatten(-1, (tile.num_past, tile.block_size))
    return in_blocks.sum(dim=-1).masked_fill_(~tile.past_t1P, 0)
