"""Attention with given block ids in portable PyTorch, sparse in time and memory, on any device.

Queries come to the keys. All work is done for one key head and some of its query heads at a time (a *pass*), and past
blocks for a range of tokens at a time, so that keys and values are never repeated and buffers stay small:

1. Triangles: stretches of tokens that attend themselves (own blocks, in a whole pack) in batched tiles, causal inside.
   Rows are taken `ROWS_OF_TRIANGLE` at a time, each against the keys up to its last row, so that little above the
   diagonal is computed.
2. Units (past blocks, in a whole pack): an *entry* is one (query row, unit). Sorted by unit (`entries`), they list the
   rows of each unit; these are gathered, attend the whole unit, and their outputs and log-sum-exps lie in sorted order.
3. Merge: each row picks its entries by the inverse permutation and adds them to the output it has by log-sum-exp in
   fp32.

`accumulate` does so for any fragment of the keys, on top of what the rows have attended already; `attend` is the whole
of it for a pack whose keys are all here.

Saved for backward: q, k, v, ids, out and lse. The backward pass makes the entries again, recomputes the probabilities
from the global lse, writes dq of entries in sorted order and adds them per row in slot order, and adds dk and dv per
unit in row order: nothing here adds in an order left open, so that on a CPU two runs with the same number of threads
give the same bits. dq, dk and dv are summed in fp32 or wider; the share of dq that each unit gives is first rounded to
the inputs' dtype, as its share of the output is.

Limitation: the work list is read on the host, so on an accelerator each call waits for the ids. The backend is portable
first.

Legend: T query tokens, N query heads, S key rows, G key heads, D head size, K past blocks per query (top_k - 1), t
tokens of a range, H query heads of a pass, E entries of a list. A query *row* is token * N + head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moba_megatron.ops.fragments import Fragment, Keys, whole_pack
from moba_megatron.ops.gathered.causal import triangles_backward, triangles_forward
from moba_megatron.ops.gathered.combine import combine_backward, combine_forward, output_delta
from moba_megatron.ops.gathered.index import Entries
from moba_megatron.ops.gathered.kv_heads import passes
from moba_megatron.ops.gathered.past import units_backward, units_forward
from moba_megatron.ops.layout import BlockLayout
from moba_megatron.ops.precision import score_dtype, without_autocast


class _EntryBuffer:
    """Room [E + 1, D] in q's dtype for what belongs to the entries of one list after the other."""

    def __init__(self, q_TND: Tensor):
        self.room = q_TND.new_empty(0, q_TND.shape[2])

    def __call__(self, entries: Entries) -> Tensor:
        if self.room.shape[0] <= entries.count:
            self.room = self.room.new_empty(entries.count + 1, self.room.shape[1])
        return self.room[: entries.count + 1]


@without_autocast
def accumulate(
    q_TND: Tensor,
    keys: Keys,
    ids_TNK: Tensor,
    fragment: Fragment,
    softmax_scale: float,
    out_TND: Tensor,
    lse_TN: Tensor,
    workspace_bytes: int | None = None,
) -> None:
    """Attend a fragment of the keys on top of what the rows have attended already; no gradient.

    Args:
        q_TND: contiguous queries [T, N, D], floating.
        keys: keys and values of some key heads, in q's dtype; only their query heads are touched.
        ids_TNK: int32 [T, N, K], block numbers within the document, each a complete past block, none twice; -1 for
            none.
        fragment: which of these keys the queries may attend.
        softmax_scale: factor on the scores.
        out_TND: output so far, changed in place; in q's dtype or, to be rounded only once, wider.
        lse_TN: its log-sum-exp in fp32 (fp64 for fp64 inputs), -inf for rows without keys so far; changed in place.
            Rows under the fragment's triangles are written, not merged: triangles come first.
        workspace_bytes: for what is kept of the entries of one pass, see `moba_attention`.
    """
    buffer = _EntryBuffer(q_TND)
    for work in passes(q_TND, keys, ids_TNK, fragment, softmax_scale, workspace_bytes):
        triangles_forward(work, out_TND, lse_TN)
        for entries in work.entries():
            part_ED = buffer(entries)
            part_lse_E = torch.empty(part_ED.shape[0], dtype=work.dtype, device=q_TND.device)
            units_forward(work, entries, part_ED, part_lse_E)
            combine_forward(entries, part_ED, part_lse_E, out_TND, lse_TN)


@without_autocast
def accumulate_backward(
    dout_TND: Tensor,
    q_TND: Tensor,
    keys: Keys,
    ids_TNK: Tensor,
    fragment: Fragment,
    softmax_scale: float,
    out_TND: Tensor | None,
    lse_TN: Tensor,
    delta_TN: Tensor,
    dq_TND: Tensor,
    dk_SGD: Tensor,
    dv_SGD: Tensor,
    workspace_bytes: int | None = None,
) -> None:
    """Gradients of one `accumulate`, as its share of the whole attention.

    Args:
        dout_TND, q_TND, out_TND: contiguous [T, N, D]; `out_TND` is the output of the *whole* attention, or None where
            it is not at hand.
        lse_TN, delta_TN: contiguous, of the whole attention (`output_delta`).
        dq_TND: fp32 or wider; this share is added.
        dk_SGD, dv_SGD: [S, G, D] in any dtype; this share is written, summed in fp32 or wider.
        workspace_bytes: as for `accumulate`.
    """
    buffer, last_group = _EntryBuffer(q_TND), -1
    for work in passes(q_TND, keys, ids_TNK, fragment, softmax_scale, workspace_bytes):
        if work.group != last_group:
            dk_SD, dv_SD = (torch.zeros_like(work.k, dtype=work.dtype) for _ in range(2))
            last_group = work.group
        triangles_backward(work, dout_TND, lse_TN, delta_TN, dq_TND, dk_SD, dv_SD)
        for entries in work.entries():
            part_ED = buffer(entries)
            units_backward(work, entries, dout_TND, out_TND, lse_TN, delta_TN, part_ED, dk_SD, dv_SD)
            combine_backward(entries, part_ED, dq_TND)
        dk_SGD[:, work.group], dv_SGD[:, work.group] = dk_SD, dv_SD


def attend_forward(
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    ids_TNK: Tensor,
    layout: BlockLayout,
    softmax_scale: float,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over each query's own block (causal) and the past blocks given by ids, in a whole pack; no gradient.

    Args:
        q_TND, k_TGD, v_TGD: queries [T, N, D], keys and values [T, G, D], one floating dtype and device.
        ids_TNK, softmax_scale, workspace_bytes: as for `accumulate`.
        layout: blocks of the pack.

    Returns:
        out [T, N, D] in q's dtype, lse [T, N] in fp32 (fp64 for fp64 inputs).
    """
    q_TND = q_TND.contiguous()
    out_TND = torch.empty_like(q_TND)
    lse_TN = torch.empty(q_TND.shape[:2], dtype=score_dtype(q_TND.dtype), device=q_TND.device)
    keys = Keys(k_TGD, v_TGD, q_TND.shape[1] // k_TGD.shape[1])
    accumulate(q_TND, keys, ids_TNK, whole_pack(layout), softmax_scale, out_TND, lse_TN, workspace_bytes)
    return out_TND, lse_TN


def attend_backward(
    dout_TND: Tensor,
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    out_TND: Tensor,
    lse_TN: Tensor,
    ids_TNK: Tensor,
    layout: BlockLayout,
    softmax_scale: float,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend_forward` with respect to q, k and v, in their dtype.

    `out_TND` and `lse_TN` are those of the *whole* attention. Where these ids are only a part of it, the results are
    this part's share, and shares add up.
    """
    q_TND, dout_TND, out_TND, lse_TN = (x.contiguous() for x in (q_TND, dout_TND, out_TND, lse_TN))
    dq_TND = torch.zeros_like(q_TND, dtype=score_dtype(q_TND.dtype))
    dk_TGD, dv_TGD = torch.empty_like(k_TGD), torch.empty_like(v_TGD)
    keys = Keys(k_TGD, v_TGD, q_TND.shape[1] // k_TGD.shape[1])
    accumulate_backward(
        dout_TND, q_TND, keys, ids_TNK, whole_pack(layout), softmax_scale,
        out_TND, lse_TN, output_delta(dout_TND, out_TND), dq_TND, dk_TGD, dv_TGD, workspace_bytes,
    )  # fmt: skip
    return dq_TND.to(q_TND.dtype), dk_TGD, dv_TGD


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, ids, *settings):
        out, lse = attend_forward(q, k, v, ids, *settings)
        ctx.save_for_backward(q, k, v, out, lse, ids)
        ctx.settings = settings
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        q, k, v, out, lse, ids = ctx.saved_tensors
        gradients = attend_backward(dout, q, k, v, out, lse, ids, *ctx.settings)
        return *gradients, None, *[None] * len(ctx.settings)


def attend(
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    ids_TNK: Tensor,
    layout: BlockLayout,
    softmax_scale: float,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend_forward` with gradients to q, k and v; the returned lse carries none."""
    return _Attend.apply(q_TND, k_TGD, v_TGD, ids_TNK, layout, softmax_scale, workspace_bytes)
