"""Attention with given block ids by the kernels of this folder: the twin of `ops.gathered`, with the same contracts.

The work of a call is cut into *passes*: some key heads and a range of tokens. Of a pass the index is built (`index`),
its entries attend their units (`units`), and own blocks and merge finish its rows (`own`). Backward likewise, with
delta, the keys' side (`backward_keys`) and the queries' side (`backward_queries`). No sum depends on the order in which
programs run: two runs give the same bits.

Memory beside inputs, outputs and gradients is the workspace of one pass, in bytes

    forward     E (D e + 12)        + 8 L C
    backward    E (D (e + 2) + 8)   + 8 L C + 16 D S g

with E = query heads x tokens x slots of the pass, e bytes of an element, L = key heads of the pass x units, C at most
1024 / key heads of the pass, S rows of all units and g key heads of the pass; and a few times 8 bytes for each token
and block. The first term is at most `workspace_bytes`: passes shrink to single key heads and then to ranges of tokens,
down to one token. The others do not shrink below one key head. Keys and values are never copied.

Saved for backward: q, k, v, ids, out and lse.

Legend: T query tokens, N query heads, S key rows, G key heads, D head size, K past blocks per query, E entries of a
pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moba_megatron.ops.fragments import Fragment, Keys
from moba_megatron.ops.layout import BlockLayout
from moba_megatron.ops.triton import config
from moba_megatron.ops.triton.backward_dkdv import own_keys_backward, units_keys_backward
from moba_megatron.ops.triton.backward_dq import output_delta, own_queries_backward, units_queries_backward
from moba_megatron.ops.triton.causal import own_forward
from moba_megatron.ops.triton.combine import (
    merge_dq,
    merge_forward,
)
from moba_megatron.ops.triton.devices import on_its_device
from moba_megatron.ops.triton.fragments import DeviceFragment, on_device, whole_pack
from moba_megatron.ops.triton.index import (
    build_index,
)
from moba_megatron.ops.triton.passes import (
    Known,
    Pass,
    backward_entry_bytes,
    forward_entry_bytes,
    passes,
)
from moba_megatron.ops.triton.past import units_forward


def _readable(keys: Keys) -> Keys:
    """Keys and values with equal strides and a contiguous last dimension; copied only where they are not so."""
    k, v = config.checked(keys.k), config.checked(keys.v)
    if k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    return Keys(k, v, keys.group_size, keys.first)


def _has_units(work: Pass, fragment: DeviceFragment) -> bool:
    return work.slots > 0 and work.rows > 0 and fragment.units.count > 0


def _partials(
    q_TND: Tensor, keys: Keys, ids_TNK: Tensor, work: Pass, fragment: DeviceFragment, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Partial outputs [E, D], log-sum-exps [E] and units [E] of a pass; None where there is nothing to attend."""
    if not _has_units(work, fragment):
        return None
    index = build_index(work, ids_TNK, fragment)
    part_ED = q_TND.new_empty(work.entries, q_TND.shape[2])
    part_lse_E = torch.empty(work.entries, dtype=torch.float32, device=q_TND.device)
    units_forward(q_TND, keys, index, fragment, softmax_scale, part_ED, part_lse_E)
    return part_ED, part_lse_E, index.units


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
) -> None:
    """Attend a fragment of the keys on top of what the rows have attended already; no gradient.

    Args:
        q_TND, keys, ids_TNK, softmax_scale, out_TND, lse_TN: as for `ops.gathered.accumulate`; bf16, fp16 or fp32,
            out in q's dtype or fp32, lse in fp32, both contiguous.
        fragment: which of these keys the queries may attend.
        workspace_bytes: see the module; `ops.kernel_sizes.default_workspace` if None.
    """
    fragment, keys = on_device(fragment, q_TND.device), _readable(keys)
    ids_TNK = ids_TNK.contiguous()
    for work in passes(q_TND, keys, ids_TNK.shape[2], fragment, forward_entry_bytes(q_TND), workspace_bytes):
        own_forward(q_TND, keys, work, fragment, softmax_scale, None, out_TND, lse_TN)
        parts = _partials(q_TND, keys, ids_TNK, work, fragment, softmax_scale)
        if parts is not None:
            merge_forward(work, parts, out_TND, lse_TN)
        del parts  # the next pass may fill the workspace


@torch.no_grad()
@on_its_device
def accumulate_backward(
    dout_TND: Tensor,
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
    """Gradients of one `accumulate`, as its share of the whole attention.

    Args:
        dout_TND, q_TND, keys, ids_TNK, softmax_scale, lse_TN, delta_TN: as for `ops.gathered.accumulate_backward`.
        out_TND: not needed here.
        dq_TND: contiguous fp32 [T, N, D]; this share is added.
        dk_SGD, dv_SGD: [S, G, D] in any dtype; this share is written, summed in fp32.
        fragment, workspace_bytes: as for `accumulate`.
    """
    fragment = on_device(fragment, q_TND.device)
    known = Known(q_TND, dout_TND, lse_TN, delta_TN)
    _backward(known, keys, ids_TNK, fragment, softmax_scale, dq_TND, True, dk_SGD, dv_SGD, workspace_bytes)


def _backward(
    known: Known,
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
    if known.q.shape[0] == 0:
        dk_SGD.zero_()
        dv_SGD.zero_()
    for work in passes(known.q, keys, ids_TNK.shape[2], fragment, backward_entry_bytes(known.q), workspace_bytes):
        if work.tokens.start == 0:
            dkv = torch.zeros(2, shape[0], work.num_groups, shape[2], dtype=torch.float32, device=known.q.device)
            own_keys_backward(known, keys, work, fragment, softmax_scale, dkv[0], dkv[1])
        parts = _units_backward(known, keys, ids_TNK, work, fragment, softmax_scale, dkv)
        own_queries_backward(
            known, keys, work, fragment, softmax_scale, None if add_to_dq else parts, dq_TND, add_to_dq
        )
        if add_to_dq and parts is not None:
            merge_dq(work, parts, dq_TND)
        del parts  # the next pass may fill the workspace
        if work.tokens.stop == known.q.shape[0]:
            dk_SGD[:, work.groups], dv_SGD[:, work.groups] = dkv[0], dkv[1]
            dkv = None


def _units_backward(
    known: Known,
    keys: Keys,
    ids_TNK: Tensor,
    work: Pass,
    fragment: DeviceFragment,
    softmax_scale: float,
    dkv: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """Add a pass's units to dk and dv; returns the shares of dq [E, D] and units [E], None where there are none."""
    if not _has_units(work, fragment):
        return None
    index = build_index(work, ids_TNK, fragment)
    part_ED = known.q.new_empty(work.entries, known.q.shape[2])
    fused = config.holds_unit_for("units_dkdv_dq", known.q, fragment.units.longest)
    units_keys_backward(known, keys, index, fragment, softmax_scale, dkv[0], dkv[1], part_ED if fused else None)
    if not fused:
        units_queries_backward(known, keys, index, fragment, softmax_scale, part_ED)
    return part_ED, index.units


@on_its_device
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
        q_TND, k_TGD, v_TGD: queries [T, N, D], keys and values [T, G, D], one dtype (bf16, fp16, fp32) and device.
        ids_TNK: int32 [T, N, K], as for `accumulate`.
        layout: blocks of the pack.
        workspace_bytes: see the module.

    Returns:
        out [T, N, D] in q's dtype, lse fp32 [T, N].
    """
    q_TND, ids_TNK = config.checked(q_TND).contiguous(), ids_TNK.contiguous()
    out_TND = torch.empty_like(q_TND)
    lse_TN = torch.empty(q_TND.shape[:2], dtype=torch.float32, device=q_TND.device)
    keys, fragment = _readable(Keys(k_TGD, v_TGD, q_TND.shape[1] // k_TGD.shape[1])), whole_pack(layout)
    for work in passes(q_TND, keys, ids_TNK.shape[2], fragment, forward_entry_bytes(q_TND), workspace_bytes):
        parts = _partials(q_TND, keys, ids_TNK, work, fragment, softmax_scale)
        own_forward(q_TND, keys, work, fragment, softmax_scale, parts, out_TND, lse_TN)
        del parts  # the next pass may fill the workspace
    return out_TND, lse_TN


@on_its_device
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
    """Gradients of `attend_forward` with respect to q, k and v, in their dtype; see `ops.gathered.attend_backward`."""
    q_TND, dout_TND, out_TND, lse_TN = (x.contiguous() for x in (q_TND, dout_TND, out_TND, lse_TN))
    dq_TND, dk_TGD, dv_TGD = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_TND, k_TGD, v_TGD))
    keys = Keys(k_TGD, v_TGD, q_TND.shape[1] // k_TGD.shape[1])
    known = Known(q_TND, dout_TND, lse_TN, output_delta(dout_TND, out_TND))
    _backward(known, keys, ids_TNK, whole_pack(layout), softmax_scale, dq_TND, False, dk_TGD, dv_TGD, workspace_bytes)
    return dq_TND, dk_TGD, dv_TGD


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, ids, layout, softmax_scale, workspace_bytes):
        out, lse = attend_forward(q, k, v, ids, layout, softmax_scale, workspace_bytes)
        ctx.save_for_backward(q, k, v, out, lse, ids)
        ctx.settings = (layout, softmax_scale, workspace_bytes)
        ctx.mark_non_differentiable(lse)
        # No zeros for the log-sum-exp's gradient that there is not.
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, _):
        q, k, v, out, lse, ids = ctx.saved_tensors
        return *attend_backward(dout, q, k, v, out, lse, ids, *ctx.settings), None, None, None, None


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
