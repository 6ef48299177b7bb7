"""Attention with given block ids in portable PyTorch, sparse in time and memory, on any device.

Queries come to the keys. All work is done for a few kv heads with their query heads at a time, or some query heads of
one (`kv_heads`), and past blocks for a range of tokens at a time, so that keys and values are never repeated and
buffers stay small:

1. `causal`: causal spans, in batched tiles.
2. `past`: entries sorted by kv block (`index`); the rows of each kv block are gathered and attend it whole.
3. `combine`: each row adds its entries to the output it has by log-sum-exp in fp32.

`accumulate` does so for any fragment of the keys, on top of what the rows have attended already; `attend` is the whole
of it for a pack whose keys are all here.

Saved for backward: q, k, v, ids, out and lse. The backward pass makes the index again, recomputes the probabilities
from the global lse, writes dq of entries in sorted order and adds them per row in slot order, and adds dk and dv per kv
block in row order: nothing here adds in an order left open, so that on a CPU two runs with the same number of threads
give the same bits. dq, dk and dv are summed in fp32 or wider; the partial dq of an entry is first rounded to the
inputs' dtype, as its partial output is.

Limitation: the index is read on the host, so on an accelerator each call waits for the ids. The backend is portable
first.

Legend: T query tokens, N query heads, S key rows, G kv heads, D head size, K past blocks per query, E entries of an
index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moba_megatron.ops.attend_function import with_gradients
from moba_megatron.ops.fragments import Fragment, Keys, whole_pack
from moba_megatron.ops.gathered.causal import causal_backward, causal_forward
from moba_megatron.ops.gathered.combine import combine_backward, combine_forward, output_delta
from moba_megatron.ops.gathered.index import Index
from moba_megatron.ops.gathered.kv_heads import each_group
from moba_megatron.ops.gathered.past import past_backward, past_forward
from moba_megatron.ops.layout import BlockLayout
from moba_megatron.ops.precision import score_dtype, without_autocast


class _EntryBuffer:
    """Room [P + 1, D] in q's dtype for what belongs to the entries of one index after the other."""

    def __init__(self, q_TND: Tensor):
        self._q_TND = q_TND
        self._room = q_TND.new_empty(0, q_TND.shape[2])

    def __call__(self, index: Index) -> Tensor:
        if self._room.shape[0] <= index.count:
            # The old room goes first: the two are never there at once.
            del self._room
            self._room = self._q_TND.new_empty(index.count + 1, self._q_TND.shape[2])
        return self._room[: index.count + 1]


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
    block_lse_TNK: Tensor | None = None,
) -> None:
    """Attend a fragment of the keys on top of what the rows have attended already; no gradient.

    Args:
        q_TND: contiguous queries [T, N, D], floating.
        keys: keys and values of some kv heads, in q's dtype; only their query heads are touched.
        ids_TNK: int32 [T, N, K], block numbers within the document, each a complete past block, none twice; -1 for
            none.
        fragment: which of these keys the queries may attend.
        softmax_scale: factor on the scores.
        out_TND: output so far, changed in place; in q's dtype or, to be rounded only once, wider.
        lse_TN: its log-sum-exp in fp32 (fp64 for fp64 inputs), -inf for rows without keys so far; changed in place.
            Rows in the fragment's causal spans are written, not combined: these spans come first.
        workspace_bytes: for what is kept of the entries of one index, see `moba_attention`.
        block_lse_TNK: log-sum-exp of each chosen block by row and place among the ids, in lse's dtype, so far (-inf
            without keys); changed in place. None: not asked for.
    """
    buffer = _EntryBuffer(q_TND)
    for kv in each_group(q_TND, keys, ids_TNK, fragment, softmax_scale, workspace_bytes):
        causal_forward(kv, out_TND, lse_TN)
        for index in kv.indexes():
            partial_lse_P = lse_TN.new_empty(index.count + 1)
            past_forward(kv, index, buffer(index), partial_lse_P)
            combine_forward(index, buffer(index), partial_lse_P, out_TND, lse_TN, block_lse_TNK)


@without_autocast
def accumulate_backward(
    do_TND: Tensor,
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
    """Gradients of one `accumulate`, as its part of those of the whole attention.

    Args:
        do_TND, q_TND, out_TND: contiguous [T, N, D]; `out_TND` is the output of the *whole* attention, or None where
            it is not at hand.
        lse_TN, delta_TN: contiguous, of the whole attention (`output_delta`).
        dq_TND: fp32 or wider; what this fragment gives is added.
        dk_SGD, dv_SGD: [S, G, D] in any dtype; what this fragment gives is written, summed in fp32 or wider.
        workspace_bytes: as for `accumulate`.
    """
    buffer, kv_heads = _EntryBuffer(q_TND), None
    for kv in each_group(q_TND, keys, ids_TNK, fragment, softmax_scale, workspace_bytes):
        if kv.kv_heads != kv_heads:
            dk_gSD, dv_gSD = (torch.zeros_like(kv.k, dtype=kv.dtype) for _ in range(2))
            kv_heads = kv.kv_heads
        causal_backward(kv, do_TND, lse_TN, delta_TN, dq_TND, dk_gSD, dv_gSD)
        for index in kv.indexes():
            factor = past_backward(kv, index, do_TND, out_TND, lse_TN, delta_TN, buffer(index), dk_gSD, dv_gSD)
            combine_backward(index, buffer(index), dq_TND, factor)
        dk_SGD[:, kv_heads], dv_SGD[:, kv_heads] = dk_gSD.transpose(0, 1), dv_gSD.transpose(0, 1)


def attend_forward(
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    ids_TNK: Tensor,
    layout: BlockLayout,
    softmax_scale: float,
    workspace_bytes: int | None = None,
    block_lse_TNK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over each query's own block (causal) and the past blocks given by ids, in a whole pack; no gradient.

    Args:
        q_TND, k_TGD, v_TGD: queries [T, N, D], keys and values [T, G, D], one floating dtype and device.
        ids_TNK, softmax_scale, workspace_bytes, block_lse_TNK: as for `accumulate`.
        layout: blocks of the pack.

    Returns:
        out [T, N, D] in q's dtype, lse [T, N] in fp32 (fp64 for fp64 inputs).
    """
    q_TND = q_TND.contiguous()
    out_TND = torch.empty_like(q_TND)
    lse_TN = torch.empty(q_TND.shape[:2], dtype=score_dtype(q_TND.dtype), device=q_TND.device)
    keys = Keys(k_TGD, v_TGD, q_TND.shape[1] // k_TGD.shape[1])
    accumulate(q_TND, keys, ids_TNK, whole_pack(layout), softmax_scale, out_TND, lse_TN, workspace_bytes, block_lse_TNK)
    return out_TND, lse_TN


def attend_backward(
    do_TND: Tensor,
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

    `out_TND` and `lse_TN` are those of the *whole* attention. Where these ids are only some of it, the results are
    what these give, and such results add up.
    """
    q_TND, do_TND, out_TND, lse_TN = (x.contiguous() for x in (q_TND, do_TND, out_TND, lse_TN))
    dq_TND = torch.zeros_like(q_TND, dtype=score_dtype(q_TND.dtype))
    dk_TGD, dv_TGD = torch.empty_like(k_TGD), torch.empty_like(v_TGD)
    keys = Keys(k_TGD, v_TGD, q_TND.shape[1] // k_TGD.shape[1])
    accumulate_backward(
        do_TND, q_TND, keys, ids_TNK, whole_pack(layout), softmax_scale,
        out_TND, lse_TN, output_delta(do_TND, out_TND), dq_TND, dk_TGD, dv_TGD, workspace_bytes,
    )  # fmt: skip
    return dq_TND.to(q_TND.dtype), dk_TGD, dv_TGD


attend = with_gradients(attend_forward, attend_backward)
"""`attend_forward` with gradients to q, k and v; the returned lse carries none."""
