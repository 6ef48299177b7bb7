"""MoBA as PyTorch operators, for tools that cannot look inside a function: `torch.compile` without graph breaks, meta
and fake tensors (shapes without data), and FLOP counters.

| operator | computes |
|---|---|
| `moba_megatron::select_past` | ids of the past blocks that each query attends |
| `moba_megatron::attend` | attention over given ids and own blocks: output and log-sum-exp |
| `moba_megatron::attend_backward` | its gradients |

A traced call uses these operators (`is_traced`). Otherwise `moba_attention` calls a backend directly, which saves the
dispatch and shows the portable backend's inner operations to profilers. In both cases the same functions run, those of
`ops.steps`; the backend is an argument. The layout of the blocks follows from the values of the boundaries, which a
tracer does not know, so each operator makes the layout and checks the values inside.

FLOP formulas (`torch.utils.flop_counter`) count pairs of one document of all tokens, which bounds those of any pack:
2 D operations for a scored pair, 4 D for an attended one, 10 D in its backward pass, which computes five products. The
counter sees an eager call of the portable backend as the products that it really computes.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moba_megatron.ops.kept_layouts import layout_of
from moba_megatron.ops.layout import BlockLayout, check_cu_seqlens
from moba_megatron.ops.pairs import attended_pairs, scored_pairs
from moba_megatron.ops.precision import score_dtype
from moba_megatron.ops.router import Router, for_heads
from moba_megatron.ops.selection import Selection
from moba_megatron.ops.steps import steps_of


def is_traced(q: Tensor, backend: str) -> bool:
    """Whether a call with these queries goes through the operators.

    That is so where it is looked at and not computed: under `torch.compile`, and on tensors without data (meta, fake)
    and other subclasses. For kernels of which PyTorch sees nothing, also where something listens to every operation, as
    FLOP counters do.
    """
    if torch.compiler.is_compiling() or q.is_meta or type(q) not in (Tensor, torch.nn.Parameter):
        return True
    return backend == "triton" and torch._C._len_torch_dispatch_stack() > 0


def _checked_layout(q: Tensor, cu_seqlens: Tensor | None, block_size: int, max_seqlen: int | None) -> BlockLayout:
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q.shape[0], q.device)
    return layout_of(q, cu_seqlens, block_size, max_seqlen)


_SETTINGS = "Tensor? cu_seqlens, int block_size, SymInt? max_seqlen, str backend"


@torch.library.custom_op(
    "moba_megatron::select_past",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, SymInt num_past, {_SETTINGS}, str selector='top_k', str summary='mean', "
    "float? threshold=None, str share_selection='none', int[]? budgets=None) -> Tensor",
)
def select_past_op(q, k, num_past, cu_seqlens, block_size, max_seqlen, backend, *selection):
    """int32 [T, N, num_past] ids of past blocks for q [T, N, D], k [T, G, D], as `ops.gathered.select_past`."""
    steps = steps_of(backend, Selection(*selection))
    layout = _checked_layout(q, cu_seqlens, block_size, max_seqlen)
    return steps.select_past(q, steps.summarize(k, layout), layout, num_past)


@select_past_op.register_fake
def _(q, k, num_past, *_):
    return q.new_empty(q.shape[0], q.shape[1], num_past, dtype=torch.int32)


@torch.library.custom_op(
    "moba_megatron::attend",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, Tensor ids, float softmax_scale, {_SETTINGS}, "
    "int? workspace_bytes=None) -> (Tensor, Tensor)",
)
def attend_op(q, k, v, ids, softmax_scale, cu_seqlens, block_size, max_seqlen, backend, workspace_bytes=None):
    """out [T, N, D] in q's dtype and lse [T, N] in fp32 or wider, as `ops.gathered.attend`; lse carries no gradient."""
    layout = _checked_layout(q, cu_seqlens, block_size, max_seqlen)
    return steps_of(backend).attend_forward(q, k, v, ids, layout, softmax_scale, workspace_bytes)


@attend_op.register_fake
def _(q, *_):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=score_dtype(q.dtype))


@torch.library.custom_op(
    "moba_megatron::attend_backward",
    mutates_args=(),
    schema="(Tensor do, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor ids, float softmax_scale, "
    f"{_SETTINGS}, int? workspace_bytes=None) -> (Tensor, Tensor, Tensor)",
)
def attend_backward_op(
    do, q, k, v, out, lse, ids, softmax_scale, cu_seqlens, block_size, max_seqlen, backend, workspace_bytes=None
):
    """dq [T, N, D], dk and dv [T, G, D] in q's dtype."""
    layout = _checked_layout(q, cu_seqlens, block_size, max_seqlen)
    attend_backward = steps_of(backend).attend_backward
    gradients = attend_backward(do, q, k, v, out, lse, ids, layout, softmax_scale, workspace_bytes)
    return tuple(x.contiguous() for x in gradients)


@attend_backward_op.register_fake
def _(do, q, k, v, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, ids, softmax_scale, cu_seqlens, *settings = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, ids, cu_seqlens)
    ctx.softmax_scale, ctx.settings = softmax_scale, settings


def _gradients(ctx, do, _):
    q, k, v, out, lse, ids, cu_seqlens = ctx.saved_tensors
    found = attend_backward_op(do, q, k, v, out, lse, ids, ctx.softmax_scale, cu_seqlens, *ctx.settings)
    return (*found, *[None] * (3 + len(ctx.settings)))


attend_op.register_autograd(_gradients, setup_context=_save)


def _sizes(q_shape, ids_shape, block_size) -> tuple[int, int, int, int]:
    tokens, heads, size = q_shape
    return heads * size, tokens, block_size, ids_shape[2] + 1


@register_flop_formula(torch.ops.moba_megatron.select_past)
def _(q_shape, k_shape, num_past, cu_seqlens_shape, block_size, max_seqlen, backend, *selection, **_) -> int:
    tokens, heads, size = q_shape
    summary = Selection(*selection).make_summary()
    if summary is None:
        return 0
    size = summary.queries(torch.empty(size, device="meta")).numel()
    return 2 * heads * size * scored_pairs(tokens, block_size)


@register_flop_formula(torch.ops.moba_megatron.attend)
def _(q_shape, k_shape, v_shape, ids_shape, softmax_scale, cu_seqlens_shape, block_size, *_, **__) -> int:
    width, *sizes = _sizes(q_shape, ids_shape, block_size)
    return 4 * width * attended_pairs(*sizes)


@register_flop_formula(torch.ops.moba_megatron.attend_backward)
def _(do_shape, q_shape, k_shape, v_shape, out, lse, ids_shape, softmax_scale, cu, block_size, *_, **__) -> int:
    width, *sizes = _sizes(q_shape, ids_shape, block_size)
    return 10 * width * attended_pairs(*sizes)


def traced_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    *,
    block_size: int,
    top_k: int,
    softmax_scale: float,
    max_seqlen: int | None,
    backend: str,
    selection: Selection,
    workspace_bytes: int | None,
    router: Router | None = None,
) -> Tensor:
    """`moba_attention` through the operators; arguments as there, `backend` resolved and a router without a loss."""
    settings = (cu_seqlens, block_size, max_seqlen, backend)
    chooses_q, chooses_k = (q, k) if router is None else (router.q, router.k)
    how = (*selection.settings.values(), selection.budgets)
    ids = select_past_op(chooses_q.detach(), chooses_k.detach(), top_k - 1, *settings, *how)
    return attend_op(q, k, v, for_heads(ids, q.shape[1]), softmax_scale, *settings, workspace_bytes)[0]


def check_traced(router: Router | None) -> None:
    """Refuse a router's loss where a call is traced. Raises ValueError."""
    if router is not None and router.learns:
        raise ValueError(
            f"router.loss = {router.loss!r} under torch.compile, on tensors without data or under a FLOP counter: the "
            "operators that tracers see make no loss of a router; use router.loss = 'none' there"
        )
