"""Cross entropy of a language model without the logits of the whole sequence in memory.

The loss of a token needs two numbers from its logits: their log-sum-exp and the logit of the target. Both are found
chunk by chunk, so that at most `chunk_size` x vocabulary logits live at once; backward computes each chunk's logits
again, turns them into their gradient and multiplies it into the gradients of hidden states and weight. A batch that
fits into one chunk keeps its logits instead, which saves the second product.

Legend: T tokens, H hidden size, V rows of this rank's shard of the output weight.

Parallelism. The vocabulary is sharded over the tensor-parallel ranks. Each rank finds its own log-sum-exp and target
logit (0 where the target lives elsewhere) for all chunks; then one all-reduce of [T] (maximum) and one of [2, T] (sum)
give the global ones. Under sequence parallelism the hidden states are gathered once, and that copy is kept for
backward, which follows at once because the loss is the last thing of the forward. The gradient of the hidden states is
summed over the ranks once, as an all-reduce or, under sequence parallelism, a reduce-scatter.

Precision. Products run in the dtype of the hidden states, as in megatron-core; softmax and the loss in fp32 (fp64 stays
fp64). The weight gradient is summed over the chunks in fp32, and returned once, in the weight's dtype.

Rows of the weight beyond the vocabulary (padding for tensor parallelism) are left out of every product: they have no
part in the loss, and their gradient is zero.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk_size: int,
    vocab_size: int,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
) -> Tensor:
    """Loss of each token, as megatron-core's own cross entropy of the output layer gives it.

    Args:
        hidden: [s, b, h] of the last layer after the final norm; [s / tp, b, h] under sequence parallelism.
        weight: [padded vocabulary / tp, h], this rank's rows of the output (or tied embedding) weight.
        labels: [b, s], token ids. An id outside the vocabulary gets the loss of a target logit of 0; mask it.
        chunk_size: tokens per chunk.
        vocab_size: entries of the vocabulary without padding.
        tp_group: tensor-parallel group; None: one rank.
        sequence_parallel: whether `hidden` is this rank's part of the sequence.

    Returns:
        [b, s] in fp32 (fp64 for fp64 inputs), in nats.

    Raises:
        ValueError: if the shapes do not belong together, or chunk_size < 1.
    """
    ranks = 1 if tp_group is None else tp_group.size()
    length = hidden.shape[0] * (ranks if sequence_parallel else 1)
    if labels.shape != (hidden.shape[1], length) or weight.shape[1] != hidden.shape[2]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} (length {length}), weight {tuple(weight.shape)} and labels "
            f"{tuple(labels.shape)} do not belong together: [s, b, h], [v, h] and [b, s]"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size = {chunk_size}: at least 1 token")
    rank = 0 if tp_group is None else tp_group.rank()
    rows = max(0, min(weight.shape[0], vocab_size - rank * weight.shape[0]))
    local_targets = labels.t().reshape(-1) - rank * weight.shape[0]
    group = tp_group if ranks > 1 else None
    losses = _ChunkedCrossEntropy.apply(
        hidden.flatten(0, 1), weight, local_targets, rows, chunk_size, group, sequence_parallel
    )
    return losses.view(length, labels.shape[0]).t().contiguous()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """See the module. Saved: hidden states (gathered), weight, targets, log-sum-exp; logits only of a single chunk."""

    @staticmethod
    def forward(
        ctx,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        target_T: Tensor,
        rows: int,
        chunk_size: int,
        group: dist.ProcessGroup | None,
        sequence_parallel: bool,
    ) -> Tensor:
        if group is not None and sequence_parallel:
            hidden_TH = _gather(hidden_TH, group)
        dtype = torch.promote_types(hidden_TH.dtype, torch.float32)
        lse_T = torch.empty(target_T.shape, dtype=dtype, device=hidden_TH.device)
        logit_T = torch.empty_like(lse_T)
        logits_CV, wide_CV = None, _wide_buffer(hidden_TH, min(chunk_size, len(target_T)), rows)
        for chunk in _chunks(len(target_T), chunk_size):
            logits_CV = hidden_TH[chunk] @ weight_VH[:rows].t()
            lse_T[chunk] = _logsumexp(logits_CV, wide_CV)
            logit_T[chunk] = _target_logits(logits_CV, target_T[chunk])
        if group is not None:
            lse_T, logit_T = _combine(lse_T, logit_T, group)
        kept = logits_CV if len(target_T) <= chunk_size else None
        ctx.save_for_backward(hidden_TH, weight_VH, target_T, lse_T, kept)
        ctx.rows, ctx.chunk_size, ctx.group, ctx.sequence_parallel = rows, chunk_size, group, sequence_parallel
        return lse_T - logit_T

    @staticmethod
    def backward(ctx, grad_T: Tensor):
        hidden_TH, weight_VH, target_T, lse_T, kept = ctx.saved_tensors
        rows_VH = weight_VH[: ctx.rows]
        # The factor of each token goes into the narrow [C, H] matrices instead of the wide [C, V] one.
        factor_T1 = grad_T[:, None]
        grad_hidden_TH = torch.empty_like(hidden_TH)
        grad_weight_VH = None
        if ctx.needs_input_grad[1]:
            grad_weight_VH = torch.zeros(weight_VH.shape, dtype=lse_T.dtype, device=weight_VH.device)
        wide_CV = _wide_buffer(hidden_TH, min(ctx.chunk_size, len(target_T)), ctx.rows)
        for chunk in _chunks(len(target_T), ctx.chunk_size):
            logits_CV = hidden_TH[chunk] @ rows_VH.t() if kept is None else kept
            error_CV = _error(logits_CV, target_T[chunk], lse_T[chunk], wide_CV)
            torch.mm(error_CV, rows_VH, out=grad_hidden_TH[chunk])
            if grad_weight_VH is None:
                continue
            scaled_CH = (hidden_TH[chunk] * factor_T1[chunk]).to(hidden_TH.dtype)
            _add_product(grad_weight_VH[: ctx.rows], error_CV.t(), scaled_CH)
        grad_hidden_TH *= factor_T1
        if ctx.group is not None:
            grad_hidden_TH = _sum_over_ranks(grad_hidden_TH, ctx.group, ctx.sequence_parallel)
        if grad_weight_VH is not None:
            grad_weight_VH = grad_weight_VH.to(weight_VH.dtype)
        return grad_hidden_TH, grad_weight_VH, None, None, None, None, None


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in place. On a GPU 16-bit operands are summed in fp32 into a wider total by the product itself;
    otherwise the product exists in their own dtype for a moment, as large as the total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.device.type in ("cuda", "meta") and _sums_wider():
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


@functools.cache
def _sums_wider() -> bool:
    """Whether this PyTorch has products of 16-bit operands with an fp32 result (2.8 and later)."""
    a, total = (torch.empty(1, 1, dtype=dtype, device="meta") for dtype in (torch.bfloat16, torch.float32))
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (TypeError, RuntimeError):
        return False
    return True


def _chunks(tokens: int, chunk_size: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk_size, tokens)) for start in range(0, tokens, chunk_size))


def _target_logits(logits_CV: Tensor, target_C: Tensor) -> Tensor:
    """The target's logit where it is one of these columns, else 0."""
    if logits_CV.shape[1] == 0:
        return torch.zeros(len(target_C), dtype=logits_CV.dtype, device=logits_CV.device)
    here_C = (target_C >= 0) & (target_C < logits_CV.shape[1])
    index_C = target_C.clamp(0, logits_CV.shape[1] - 1)
    return logits_CV.gather(1, index_C[:, None]).squeeze(1).masked_fill(~here_C, 0.0)


def _wide_buffer(hidden_TH: Tensor, tokens: int, rows: int) -> Tensor:
    """Room for one chunk's scores in the precision of the softmax. Made once a call: on a CPU, fresh pages for every
    chunk cost more than the arithmetic on them."""
    dtype = torch.promote_types(hidden_TH.dtype, torch.float32)
    return torch.empty(tokens, rows, dtype=dtype, device=hidden_TH.device)


def _logsumexp(logits_CV: Tensor, wide_CV: Tensor) -> Tensor:
    """Log-sum-exp over the columns [C], by way of the buffer; -inf if there is no column."""
    if logits_CV.shape[1] == 0:
        return wide_CV.new_full(logits_CV.shape[:1], -torch.inf)
    scores_CV = wide_CV[: len(logits_CV)].copy_(logits_CV)
    largest_C = scores_CV.amax(dim=-1)
    return scores_CV.sub_(largest_C[:, None]).exp_().sum(dim=-1).log_().add_(largest_C)


def _error(logits_CV: Tensor, target_C: Tensor, lse_C: Tensor, wide_CV: Tensor) -> Tensor:
    """Softmax minus the one-hot target, in the dtype of the logits: the gradient of the loss by the logits."""
    error_CV = wide_CV[: len(logits_CV)].copy_(logits_CV).sub_(lse_C[:, None]).exp_()
    if error_CV.shape[1]:
        here_C = (target_C >= 0) & (target_C < error_CV.shape[1])
        index_C = target_C.clamp(0, error_CV.shape[1] - 1)
        error_CV.scatter_add_(1, index_C[:, None], -here_C.to(error_CV.dtype)[:, None])
    return error_CV.to(logits_CV.dtype)


def _combine(lse_T: Tensor, logit_T: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over all shards, and the target's logit from the shard that has it."""
    largest_T = lse_T.clone()
    dist.all_reduce(largest_T, op=dist.ReduceOp.MAX, group=group)
    sums_2T = torch.stack([(lse_T - largest_T).exp_(), logit_T])
    dist.all_reduce(sums_2T, group=group)
    return largest_T + sums_2T[0].log(), sums_2T[1]


def _gather(local: Tensor, group: dist.ProcessGroup) -> Tensor:
    whole = torch.empty(group.size() * local.shape[0], *local.shape[1:], dtype=local.dtype, device=local.device)
    dist.all_gather_into_tensor(whole, local.contiguous(), group=group)
    return whole


def _sum_over_ranks(gradient: Tensor, group: dist.ProcessGroup, scatter: bool) -> Tensor:
    if not scatter:
        dist.all_reduce(gradient, group=group)
        return gradient
    part = gradient.new_empty(gradient.shape[0] // group.size(), *gradient.shape[1:])
    dist.reduce_scatter_tensor(part, gradient, group=group)
    return part
