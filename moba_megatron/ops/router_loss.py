"""The loss of a router: the router learns the shares of attention that its chosen blocks get.

For a token t and a router head h with the query heads S(h) that it chooses for (those of its key head, or one), over
its chosen past blocks i (the sparse loss):

    m_i  = mean over S(h) of exp(lse_i - lse)       the block's share of the attention; lse of all attended keys
    p    = m / sum m                                the target, without gradient
    z_i  = a . b_i / sqrt(C)                        a: the router's query, b_i: the block's mean router key
    pi   = softmax of z
    L_t  = mean over h of sum_i p_i (log p_i - log pi_i)

with 0 log 0 = 0; L_t is 0 where fewer than two blocks were chosen, or where these have no mass. The distillation is
SeerAttention's (arXiv 2410.13276), over the chosen blocks alone as in MiniMax Sparse Attention (arXiv 2606.13392).

The log-sum-exps lse_i come from the attention itself (`block_lse` of `ops.gathered.accumulate`). The forward pass makes
dL/dz_i = mask (pi_i - p_i) / H and keeps it, 4 bytes x T H K; the backward pass sums it to router queries and to
summaries in a fixed order, so that two runs give the same bits, and each key of a block gets an equal part of its
summary's gradient. Sums are in fp32, or fp64 for fp64 inputs. Work is done for a few tokens at a time: nothing of size
T x H x K x C is alive at once.

Legend: T tokens, N query heads, H router heads, J router key heads, C router head size, K past blocks per query, M
blocks, R query heads of a router head, t tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from moba_megatron.ops.gathered.row_sums import sums_of_chosen
from moba_megatron.ops.layout import BlockLayout, TokenBlocks
from moba_megatron.ops.precision import score_dtype, without_autocast
from moba_megatron.ops.router import Router, RouterLoss, counted_tokens, for_heads, no_loss
from moba_megatron.ops.steps import Steps

# Elements of gathered summaries held at once.
GATHERED_ON_CPU, GATHERED_ON_ACCELERATOR = 2**20, 2**26
# Entries of a summary whose gradients are added one after the other.
PIECE = 512
# Below this a row's chosen blocks count as without mass.
NO_MASS = 1e-20


def learning_attention(
    steps: Steps,
    router: Router,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ids_THK: Tensor,
    summaries_MJC: Tensor,
    layout: BlockLayout,
    softmax_scale: float,
    workspace_bytes: int | None,
) -> tuple[Tensor, RouterLoss]:
    """Attention of a whole pack with the router's choice, and the router's sparse loss."""
    ids_TNK = for_heads(ids_THK, q.shape[1])
    block_lse_TNK = torch.full(ids_TNK.shape, -torch.inf, dtype=score_dtype(q.dtype), device=q.device)
    out, lse_TN = steps.attend(q, k, v, ids_TNK, layout, softmax_scale, workspace_bytes, block_lse_TNK)
    masses_THK = block_masses(block_lse_TNK, lse_TN, ids_THK.shape[1])
    return out, sparse_loss(router, summaries_MJC, ids_THK, masses_THK, layout, layout.block_lengths())


@without_autocast
def block_masses(block_lse_TNK: Tensor, lse_TN: Tensor, num_router_heads: int) -> Tensor:
    """[T, H, K] in lse's dtype: shares of the attention that chosen past blocks get, the mean over the query heads of
    a router head; 0 for a slot without a block."""
    num_tokens, num_heads, num_past = block_lse_TNK.shape
    masses_THK = lse_TN.new_empty(num_tokens, num_router_heads, num_past)
    for tokens in _tiles(num_tokens, num_heads * num_past, block_lse_TNK.device):
        shares_tNK = (block_lse_TNK[tokens] - lse_TN[tokens].unsqueeze(-1)).exp_()
        masses_THK[tokens] = shares_tNK.unflatten(1, (num_router_heads, -1)).mean(dim=2)
    return masses_THK


def sparse_loss(
    router: Router,
    summaries_MJC: Tensor,
    ids_THK: Tensor,
    masses_THK: Tensor,
    blocks: TokenBlocks,
    block_lengths_M: Tensor,
    sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
) -> RouterLoss:
    """The sparse loss of these tokens, see the module.

    Args:
        router: queries, keys and mask of T tokens, all of the pack or some of them in rising order.
        summaries_MJC: means of the router's keys, of all blocks of the pack, in fp32 or wider.
        ids_THK: int32, chosen past blocks by their number within the document, -1 for none.
        masses_THK: of `block_masses`.
        blocks: blocks of these tokens.
        block_lengths_M: int64, tokens of each block.
        sum_over_ranks: where other ranks hold the other tokens: sums the gradient of the summaries over the ranks,
            which all call it together in the backward pass.

    Returns:
        Sums over these tokens. The gradient reaches `router.q` and `router.k`.
    """
    if ids_THK.numel() == 0:
        return no_loss(router)
    loss, entropy = _SparseLoss.apply(
        router.q, router.k, summaries_MJC, ids_THK, masses_THK, blocks, block_lengths_M, router.loss_mask,
        sum_over_ranks,
    )  # fmt: skip
    return RouterLoss(loss, entropy, counted_tokens(router).to(loss.dtype))


class _SparseLoss(torch.autograd.Function):
    """Saved for backward: the router's queries, summaries, ids and dL/dz."""

    @staticmethod
    @without_autocast
    def forward(
        ctx,
        q_THC: Tensor,
        k_TJC: Tensor,
        summaries_MJC: Tensor,
        ids_THK: Tensor,
        masses_THK: Tensor,
        blocks: TokenBlocks,
        block_lengths_M: Tensor,
        mask_T: Tensor | None,
        sum_over_ranks: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        dtype = score_dtype(q_THC.dtype)
        q_THC, summaries_MJC = q_THC.contiguous(), summaries_MJC.to(dtype).contiguous()
        num_tokens, num_heads, num_past = ids_THK.shape
        dz_THK = torch.empty(ids_THK.shape, dtype=dtype, device=q_THC.device)
        sums = torch.zeros(2, dtype=torch.float64, device=q_THC.device)
        for tokens in _tiles(num_tokens, num_heads * num_past * q_THC.shape[2], q_THC.device):
            chosen_tHK = ids_THK[tokens] >= 0
            rows_tHK = _summary_rows(ids_THK[tokens], blocks.first_block_T[tokens], summaries_MJC.shape[1])
            b_tHKC = summaries_MJC.flatten(0, 1)[rows_tHK]
            z_tHK = (b_tHKC @ q_THC[tokens].to(dtype).unsqueeze(-1)).squeeze(-1) * q_THC.shape[2] ** -0.5
            p_tHK, log_pi_tHK, counts_tH = target_and_shares(masses_THK[tokens], z_tHK, chosen_tHK)
            mask_t11 = mask_of(mask_T, tokens, dtype)
            dz_tHK = (log_pi_tHK.exp() - p_tHK).masked_fill_(~(chosen_tHK & counts_tH.unsqueeze(-1)), 0)
            dz_THK[tokens] = dz_tHK.mul_(mask_t11 / num_heads) if mask_t11 is not None else dz_tHK.div_(num_heads)
            sums += loss_and_entropy(p_tHK, log_pi_tHK, counts_tH, mask_t11)
        ctx.save_for_backward(q_THC, summaries_MJC, ids_THK, dz_THK)
        ctx.blocks, ctx.block_lengths_M, ctx.sum_over_ranks = blocks, block_lengths_M, sum_over_ranks
        ctx.k_dtype = k_TJC.dtype
        loss, entropy = (sums / num_heads).to(dtype).unbind(0)
        loss, entropy = loss.clone(), entropy.clone()
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx, dloss: Tensor, _):
        q_THC, summaries_MJC, ids_THK, dz_THK = ctx.saved_tensors
        num_blocks, num_key_heads, size = summaries_MJC.shape
        scale = size**-0.5 * dloss.to(dz_THK.dtype)
        dq_THC = torch.empty_like(q_THC)
        db_XC = torch.zeros(num_blocks * num_key_heads, size, dtype=dz_THK.dtype, device=q_THC.device)
        for tokens in _tiles(q_THC.shape[0], ids_THK[0].numel() * 16, q_THC.device):
            rows_tHK = _summary_rows(ids_THK[tokens], ctx.blocks.first_block_T[tokens], num_key_heads)
            dz_tHK = dz_THK[tokens] * scale
            dq = sums_of_chosen(summaries_MJC.flatten(0, 1), rows_tHK.flatten(0, 1), dz_tHK.flatten(0, 1))
            dq_THC[tokens] = dq.view(dq_THC[tokens].shape)
            db_XC += _sums_by_row(q_THC[tokens].to(dz_tHK.dtype).flatten(0, 1), rows_tHK, dz_tHK, db_XC.shape[0])
        db_MJC = db_XC.view(summaries_MJC.shape)
        dk_TJC = spread_to_keys(db_MJC, ctx.blocks, ctx.block_lengths_M, ctx.sum_over_ranks).to(ctx.k_dtype)
        return dq_THC, dk_TJC, *[None] * 7


def target_and_shares(m_tHK: Tensor, z_tHK: Tensor, chosen_tHK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The target p, the logarithm of the router's shares (0 where there is no block), and bool [t, H], whether the row
    has two blocks or more, and mass."""
    log_pi_tHK = z_tHK.masked_fill(~chosen_tHK, -torch.inf).log_softmax(dim=-1).masked_fill(~chosen_tHK, 0)
    total_tH1 = m_tHK.sum(dim=-1, keepdim=True)
    counts_tH = (chosen_tHK.sum(dim=-1) > 1) & (total_tH1.squeeze(-1) > NO_MASS)
    return m_tHK / total_tH1.clamp(min=NO_MASS), log_pi_tHK, counts_tH


def loss_and_entropy(p_tHK: Tensor, log_pi_tHK: Tensor, counts_tH: Tensor, mask_t11: Tensor | None) -> Tensor:
    """fp64 [2]: sums over tokens and heads of the loss, where it counts, and of the entropy of the shares."""
    # xlogy is 0 at 0.
    loss_tH = (torch.xlogy(p_tHK, p_tHK) - p_tHK * log_pi_tHK).sum(dim=-1).masked_fill_(~counts_tH, 0)
    entropy_tH = -(log_pi_tHK.exp() * log_pi_tHK).sum(dim=-1)
    both_2tH = torch.stack([loss_tH, entropy_tH])
    if mask_t11 is not None:
        both_2tH = both_2tH * mask_t11.squeeze(-1)
    return both_2tH.sum(dim=(1, 2), dtype=torch.float64)


def spread_to_keys(
    db_MJC: Tensor,
    blocks: TokenBlocks,
    block_lengths_M: Tensor,
    sum_over_ranks: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """The gradient of router keys [T, J, C] from that of the blocks' means, which is summed over ranks first."""
    if sum_over_ranks is not None:
        db_MJC = sum_over_ranks(db_MJC)
    db_MJC = db_MJC / block_lengths_M.clamp(min=1).to(db_MJC.dtype).view(-1, 1, 1)
    return db_MJC.index_select(0, blocks.pack_block_T)


def _tiles(num_tokens: int, elements_of_token: int, device: torch.device) -> Iterator[slice]:
    """Ranges of tokens, of as many elements as may be held at once."""
    most = GATHERED_ON_CPU if device.type == "cpu" else GATHERED_ON_ACCELERATOR
    step = max(1, most // max(1, elements_of_token))
    for first in range(0, num_tokens, step):
        yield slice(first, min(first + step, num_tokens))


def mask_of(mask_T: Tensor | None, tokens: slice, dtype: torch.dtype) -> Tensor | None:
    """[t, 1, 1]: which of these tokens count; None where all do."""
    return None if mask_T is None else mask_T[tokens].to(dtype).view(-1, 1, 1)


def _summary_rows(ids_tHK: Tensor, first_block_t: Tensor, num_key_heads: int) -> Tensor:
    """int64 [t, H, K]: rows of the chosen blocks' summaries among M x J; some row where there is no block."""
    block_tHK = ids_tHK.clamp(min=0).to(torch.int64) + first_block_t.view(-1, 1, 1)
    head_H = torch.arange(ids_tHK.shape[1], device=ids_tHK.device) * num_key_heads // ids_tHK.shape[1]
    return block_tHK * num_key_heads + head_H.view(1, -1, 1)


def _sums_by_row(q_XC: Tensor, rows_tHK: Tensor, weights_tHK: Tensor, count: int) -> Tensor:
    """[count, C]: for each row the sum of the queries that name it, weighted, in the order of the queries.

    A row that many name is summed in pieces, cut where others begin and at every `PIECE` entries, and these are added
    in order: so no thread of an accelerator sums for long, and no size depends on the choice.
    """
    rows_E, order_E = rows_tHK.flatten().sort(stable=True)
    starts = torch.searchsorted(rows_E, torch.arange(count, device=rows_E.device))
    cuts = torch.cat([starts, torch.arange(0, rows_E.numel(), PIECE, device=rows_E.device)]).sort().values
    queries_E = order_E.div(rows_tHK.shape[2], rounding_mode="floor")
    pieces = embedding_bag(queries_E, q_XC, cuts, mode="sum", per_sample_weights=weights_tHK.flatten()[order_E])
    # Where rows begin at one place all but the last of them are empty, and so are the pieces before the last one there.
    numbers = torch.arange(cuts.numel(), device=cuts.device)
    return embedding_bag(numbers, pieces, torch.searchsorted(cuts, starts), mode="sum")
