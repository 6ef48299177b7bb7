"""Attention with given block ids by the kernels of this folder. It has the contracts of `gathered.attention`.

A call is cut into passes. Each pass builds its index (`index`), lets its entries attend their kv blocks (`past`), and
finishes its rows with causal spans and combining (`causal`, `combine`). The backward does the same with delta, dk and
dv (`backward_dkdv`) and dq (`backward_dq`). No sum depends on the order in which programs run: two runs give the same
bits.

Inputs, outputs and gradients aside, memory is the workspace of one pass, in bytes

    forward     E (D e + 12)        + 4 L C
    backward    E (D (e + 2) + 8)   + 4 L C + 16 D S g

with E = query heads x tokens x slots of the pass, e bytes of an element, L = kv heads of the pass x kv blocks, C at
most 1024 / kv heads of the pass, S rows of all kv blocks and g kv heads of the pass; and a few times 8 bytes for each
token and block. The first term is at most `workspace_bytes`: passes shrink to single kv heads and then to ranges of
tokens, down to one token. The others do not shrink below one kv head. Keys and values are never copied.

Saved for backward: q, k, v, ids, out and lse.

Legend: T query tokens, N query heads, S key rows, G kv heads, D head size, K past blocks per query, E entries of a
pass.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moba_megatron.ops.attend_function import with_gradients
from moba_megatron.ops.fragments import Fragment, Keys
from moba_megatron.ops.layout import BlockLayout
from moba_megatron.ops.triton import config
from moba_megatron.ops.triton.backward_dkdv import causal_backward_dkdv, dkdv_cut, past_backward_dkdv, writes_dq
from moba_megatron.ops.triton.backward_dq import causal_backward_dq, dq_cut, output_delta, past_backward_dq
from moba_megatron.ops.triton.causal import causal_forward
from moba_megatron.ops.triton.combine import combine_backward_dq, combine_block_lse, combine_forward
from moba_megatron.ops.triton.devices import on_its_device
from moba_megatron.ops.triton.fragments import DeviceFragment, on_device, whole_pack
from moba_megatron.ops.triton.index import build_index
from moba_megatron.ops.triton.passes import Pass, QueryRows, backward_entry_bytes, forward_entry_bytes, passes
from moba_megatron.ops.triton.past import forward_cut, past_forward


def _readable(keys: Keys) -> Keys:
    """Keys and values with equal strides and a contiguous last dimension; copied only if they differ."""
    k, v = config.checked(keys.k), config.checked(keys.v)
    if k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    return Keys(k, v, keys.qheads_per_kvhead, keys.first_kv_head)


def _contiguous(*tensors: Tensor) -> bool:
    return all(x.is_contiguous() for x in tensors)


def _has_entries(work: Pass, fragment: DeviceFragment) -> bool:
    return work.num_entries > 0 and fragment.kv_blocks.count > 0


def _past_partials(
    q_TND: Tensor, keys: Keys, ids_TNK: Tensor, work: Pass, fragment: DeviceFragment, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Partial outputs [E, D], log-sum-exps [E] and kv blocks [E] of a pass; None where there is nothing to attend."""
    if not _has_entries(work, fragment):
        return None
    index = build_index(work, ids_TNK, fragment, forward_cut(q_TND, fragment.kv_blocks.longest))
    partial_out_ED = q_TND.new_empty(work.num_entries, q_TND.shape[2])
    partial_lse_E = torch.empty(work.num_entries, dtype=torch.float32, device=q_TND.device)
    past_forward(q_TND, keys, index, fragment, softmax_scale, partial_out_ED, partial_lse_E)
    return partial_out_ED, partial_lse_E, index.entry_kv_blocks


@torch.no_grad()
@on_its_device
def accumulate(
    q_TND: Tensor,
    keys: Keys,
    ids_TNK: Tensor,
    fragment: Fragment | DeviceFragment,
    softmax_scale: float,
    out_TND: Tensor,
    lse_TN: Tensor,
    workspace_bytes: int | None = None,
    block_lse_TNK: Tensor | None = None,
) -> None:
    """Attend a fragment of the keys and combine with what the rows have attended already; no gradient.

    Args:
        q_TND, keys, ids_TNK, softmax_scale, out_TND, lse_TN: as for `ops.gathered.accumulate`; bf16, fp16 or fp32,
            out in q's dtype or fp32, lse in fp32, both contiguous.
        fragment: which of these keys the queries may attend.
        workspace_bytes: see the module; `ops.kernel_sizes.default_workspace` if None.
        block_lse_TNK: fp32, as for `ops.gathered.accumulate`.
    """
    fragment, keys = on_device(fragment, q_TND.device), _readable(keys)
    if block_lse_TNK is not None:
        # A slot for every id, so that a slot's place tells the block.
        fragment = dataclasses.replace(fragment, most_held=None)
    ids_TNK = ids_TNK.contiguous()
    for work in passes(q_TND, keys, ids_TNK.shape[2], fragment, forward_entry_bytes(q_TND), workspace_bytes):
        causal_forward(q_TND, keys, work, fragment, softmax_scale, None, out_TND, lse_TN)
        partials = _past_partials(q_TND, keys, ids_TNK, work, fragment, softmax_scale)
        if partials is not None:
            combine_forward(work, partials, out_TND, lse_TN)
            if block_lse_TNK is not None:
                combine_block_lse(work, partials, block_lse_TNK)
        del partials  # the next pass may fill the workspace


@torch.no_grad()
@on_its_device
def accumulate_backward(
    do_TND: Tensor,
    q_TND: Tensor,
    keys: Keys,
    ids_TNK: Tensor,
    fragment: Fragment | DeviceFragment,
    softmax_scale: float,
    out_TND: Tensor | None,
    lse_TN: Tensor,
    delta_TN: Tensor,
    dq_TND: Tensor,
    dk_SGD: Tensor,
    dv_SGD: Tensor,
    workspace_bytes: int | None = None,
) -> None:
    """Gradients of one `accumulate`: its part of the gradients of the whole attention.

    Args:
        do_TND, q_TND, keys, ids_TNK, softmax_scale, lse_TN, delta_TN: as for `ops.gathered.accumulate_backward`.
        out_TND: not needed here.
        dq_TND: contiguous fp32 [T, N, D]; what this fragment gives is added.
        dk_SGD, dv_SGD: [S, G, D] in any dtype; what this fragment gives is written, summed in fp32.
        fragment, workspace_bytes: as for `accumulate`.
    """
    fragment = on_device(fragment, q_TND.device)
    rows = QueryRows(q_TND, do_TND, lse_TN, delta_TN)
    _backward(rows, keys, ids_TNK, fragment, softmax_scale, dq_TND, True, dk_SGD, dv_SGD, workspace_bytes)


def _backward(
    rows: QueryRows,
    keys: Keys,
    ids_TNK: Tensor,
    fragment: DeviceFragment,
    softmax_scale: float,
    dq_TND: Tensor,
    add_to_dq: bool,
    dk_SGD: Tensor,
    dv_SGD: Tensor,
    workspace_bytes: int | None,
) -> None:
    keys, ids_TNK = _readable(keys), ids_TNK.contiguous()
    shape, dkv = keys.k.shape, None
    if rows.q.shape[0] == 0:
        dk_SGD.zero_()
        dv_SGD.zero_()
    for work in passes(rows.q, keys, ids_TNK.shape[2], fragment, backward_entry_bytes(rows.q), workspace_bytes):
        if work.tokens.start == 0:
            room = torch.empty if fragment.covers_keys else torch.zeros
            dkv = room(2, shape[0], work.num_kv_heads, shape[2], dtype=torch.float32, device=rows.q.device)
            causal_backward_dkdv(rows, keys, work, fragment, softmax_scale, dkv[0], dkv[1])
        last = work.tokens.stop == rows.q.shape[0]
        # Sums of the last range of tokens are the results, written as they are added.
        finishes = last and fragment.covers_keys and _has_entries(work, fragment) and _contiguous(dk_SGD, dv_SGD)
        finished = (dk_SGD, dv_SGD) if finishes else None
        partials = _past_backward(rows, keys, ids_TNK, work, fragment, softmax_scale, dkv, finished)
        causal_backward_dq(
            rows, keys, work, fragment, softmax_scale, None if add_to_dq else partials, dq_TND, add_to_dq
        )
        if add_to_dq and partials is not None:
            combine_backward_dq(work, partials, dq_TND)
        del partials  # the next pass may fill the workspace
        if last:
            if not finishes:
                dk_SGD[:, work.kv_heads], dv_SGD[:, work.kv_heads] = dkv[0], dkv[1]
            dkv = None


def _past_backward(
    rows: QueryRows,
    keys: Keys,
    ids_TNK: Tensor,
    work: Pass,
    fragment: DeviceFragment,
    softmax_scale: float,
    dkv: Tensor,
    finished: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor] | None:
    """Add dk and dv of a pass's kv blocks, or write the `finished` ones; returns partial dq [E, D] and kv blocks [E],
    None for none."""
    if not _has_entries(work, fragment):
        return None
    longest = fragment.kv_blocks.longest
    fused = writes_dq(rows.q, longest)
    cuts = (dkdv_cut(rows.q, longest), None if fused else dq_cut(rows.q, longest))
    index = build_index(work, ids_TNK, fragment, *cuts)
    partial_dq_ED = rows.q.new_empty(work.num_entries, rows.q.shape[2])
    past_backward_dkdv(
        rows, keys, index, fragment, softmax_scale, dkv[0], dkv[1], partial_dq_ED if fused else None, finished
    )
    if not fused:
        past_backward_dq(rows, keys, index, fragment, softmax_scale, partial_dq_ED)
    return partial_dq_ED, index.entry_kv_blocks


@on_its_device
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
        q_TND, k_TGD, v_TGD: queries [T, N, D], keys and values [T, G, D], one dtype (bf16, fp16, fp32) and device.
        ids_TNK: int32 [T, N, K], as for `accumulate`.
        layout: blocks of the pack.
        workspace_bytes: see the module.
        block_lse_TNK: as for `accumulate`.

    Returns:
        out [T, N, D] in q's dtype, lse fp32 [T, N].
    """
    q_TND, ids_TNK = config.checked(q_TND).contiguous(), ids_TNK.contiguous()
    out_TND = torch.empty_like(q_TND)
    lse_TN = torch.empty(q_TND.shape[:2], dtype=torch.float32, device=q_TND.device)
    keys, fragment = _readable(Keys(k_TGD, v_TGD, q_TND.shape[1] // k_TGD.shape[1])), whole_pack(layout)
    for work in passes(q_TND, keys, ids_TNK.shape[2], fragment, forward_entry_bytes(q_TND), workspace_bytes):
        partials = _past_partials(q_TND, keys, ids_TNK, work, fragment, softmax_scale)
        causal_forward(q_TND, keys, work, fragment, softmax_scale, partials, out_TND, lse_TN)
        if block_lse_TNK is not None and partials is not None:
            combine_block_lse(work, partials, block_lse_TNK)
        del partials  # the next pass may fill the workspace
    return out_TND, lse_TN


@on_its_device
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
    """Gradients of `attend_forward` with respect to q, k and v, in their dtype; see `ops.gathered.attend_backward`."""
    q_TND, do_TND, out_TND, lse_TN = (x.contiguous() for x in (q_TND, do_TND, out_TND, lse_TN))
    dq_TND, dk_TGD, dv_TGD = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_TND, k_TGD, v_TGD))
    keys = Keys(k_TGD, v_TGD, q_TND.shape[1] // k_TGD.shape[1])
    rows = QueryRows(q_TND, do_TND, lse_TN, output_delta(do_TND, out_TND))
    _backward(rows, keys, ids_TNK, whole_pack(layout), softmax_scale, dq_TND, False, dk_TGD, dv_TGD, workspace_bytes)
    return dq_TND, dk_TGD, dv_TGD


attend = with_gradients(attend_forward, attend_backward)
"""`attend_forward` with gradients to q, k and v; the returned lse carries none."""
