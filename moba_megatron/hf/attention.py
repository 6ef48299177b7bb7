"""The attention registered as "moba": what a transformers layer calls between rotary embedding and output projection.

Three cases, by where the queries' documents begin (`mask.segments`):

1. All documents begin in this call: training, evaluation, a prompt. Their tokens, without padding, are one pack for
   `moba_attention` or `full_attention`, with gradients, and by the GPU kernels where they run.
2. One new token of a document whose past is in a cache: decoding. In `moba` layers the configuration's `decode` decides
   whether it attends to its blocks or to all tokens; in `full` layers it attends to everything.
3. Several new tokens with a past: a further piece of a prompt. MoBA in `moba` layers, in either decode mode.

Cases 2 and 3 have no gradient; a call that needs one raises. Everything else than causal MoBA over whole documents also
raises: nothing falls back silently to dense attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moba_megatron.hf.cache import BlockSummaries
from moba_megatron.hf.mask import Segment, segments
from moba_megatron.hf.packing import check_packing
from moba_megatron.hf.settings import MoBASettings
from moba_megatron.ops import full_attention, moba_attention
from moba_megatron.ops.decode import continue_text, decode_tokens
from moba_megatron.ops.router import Router

Index = tuple[Tensor, Tensor]
"""Index queries and keys of a layer."""
# What a model may pass that changes attention, and is not MoBA.
NOT_MOBA = {
    "sliding_window": "set config.sliding_window = None",
    "softcap": "use a model without softcapping of attention scores",
    "s_aux": "use a model without attention sinks",
    "position_bias": "use a model with rotary positions",
    "head_mask": "leave it out",
    "output_attentions": "there is no matrix of weights to return; leave it out",
}


@torch.compiler.disable
def moba_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend, as transformers' attention interface asks.

    Args:
        module: the attention layer; its `config.moba_config` and `layer_idx` say how it attends.
        query: [batch, N, queries, D] after rotary embedding.
        key, value: [batch, G, slots, D], with a cache all of its slots; N a multiple of G.
        attention_mask: what `moba_mask` returned.
        scaling: factor on the scores, 1/sqrt(D) if None.

    Returns:
        [batch, queries, N, D] in query's dtype, 0 for padding; and no weights.

    Raises:
        ValueError: no settings, something that is not MoBA (dropout, windows, softcapping, masks, ...), or keywords of
            packing that tell other documents than `position_ids` (`packing.check_packing`).
    """
    settings = MoBASettings.from_config(module.config).of_layer(module.layer_idx)
    if settings.key_convolution and not hasattr(module, "k_conv"):
        raise ValueError(
            f"this model's keys are convolved (moba_config: key_convolution = {settings.key_convolution}), and "
            f"{type(module).__name__} has no such filters: load it with trust_remote_code=True, which runs its own code"
        )
    router = _index_of(module, settings, query, key)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    _refuse_what_is_not_moba(dropout, causal, kwargs)
    is_moba = settings.layer_types[module.layer_idx] == "moba"
    stretches = segments(attention_mask, kwargs.get("position_ids"))
    check_packing(attention_mask, stretches, query.shape[0], query.shape[2], kwargs)
    if all(s.past == 0 and s.first == s.start for s in stretches):
        return _whole(query, key, value, stretches, settings if is_moba else None, scaling, router), None
    inputs = (query, key, value)
    with torch.no_grad():
        if _is_one_step(stretches, query.shape):
            sparse = is_moba and settings.decode == "moba"
            out = _step(*inputs, stretches[0], settings if sparse else None, scaling, router)
        else:
            out = query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
            for s in stretches:
                decoding = s.end - s.start == 1
                sparse = is_moba and not (decoding and settings.decode == "full")
                out[s.row, s.start : s.end] = _continue(*inputs, s, settings if sparse else None, scaling, router)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        out = _NoGradient.apply(out, *inputs)
    return out, None


def _index_of(module: torch.nn.Module, settings: MoBASettings, query: Tensor, key: Tensor) -> Index | None:
    """Index queries [batch, H, queries, C] and keys [batch, J, slots, C] of a layer; None where it has no index.

    Raises:
        ValueError: the configuration has an index, and the layer has none, or that of other tokens.
    """
    if settings.index is None or settings.layer_types[module.layer_idx] != "moba":
        return None
    router = getattr(module, "block_router", None)
    if router is None or router.inputs is None:
        raise ValueError(
            f"this model's blocks are chosen by an index (moba_config: router = index), and {type(module).__name__} "
            "has none: load it with from_pretrained after `import moba_megatron.hf`"
        )
    router_q, router_k = router.inputs
    if router_q.shape[2] != query.shape[2] or router_k.shape[2] != key.shape[2]:
        raise ValueError(
            f"the index has queries of {router_q.shape[2]} and keys of {router_k.shape[2]} tokens, but the attention "
            f"has {query.shape[2]} and {key.shape[2]}: start with an empty cache of one kind"
        )
    return router_q, router_k


def _refuse_what_is_not_moba(dropout: float, causal: bool, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise ValueError(f"MoBA has no dropout in attention, got {dropout}: set config.attention_dropout = 0.0")
    if not causal:
        raise ValueError("this layer's attention is not causal, but MoBA is: use another attn_implementation")
    for name, fix in NOT_MOBA.items():
        given = kwargs.get(name)
        if given is not None and given is not False:
            shown = f" of shape {tuple(given.shape)}" if isinstance(given, Tensor) else f" = {given!r}"
            raise ValueError(f"{name}{shown} is not MoBA: {fix}")


def _whole(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stretches: list[Segment],
    settings: MoBASettings | None,
    scale: float | None,
    index: Index | None = None,
) -> Tensor:
    """Documents that begin in this call, as one pack; with gradients."""
    batch, heads, length, _ = query.shape
    tensors = (query, key, value, *(index or ()))
    q, k, v, *chooses = (x[:, :, :length].transpose(1, 2).flatten(0, 1) for x in tensors)
    lengths = [s.length for s in stretches]
    padded = sum(lengths) < batch * length
    if padded:
        # The stretches come in order of rows and queries.
        indices = [torch.arange(s.row * length + s.start, s.row * length + s.end) for s in stretches]
        real = torch.cat([torch.arange(0), *indices]).to(q.device)
        q, k, v, *chooses = (x.index_select(0, real) for x in (q, k, v, *chooses))
    if not stretches:
        return query.new_zeros(batch, length, heads, value.shape[3])
    cu_seqlens = None
    if len(lengths) > 1:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(q.device)
    pack: dict[str, Any] = {"softmax_scale": scale, "max_seqlen": max(lengths)}
    if settings is None:
        out = full_attention(q, k, v, cu_seqlens, **pack)
    else:
        sizes = {"block_size": settings.block_size, "top_k": settings.selection.blocks(settings.top_k)}
        router = Router(*chooses) if chooses else None
        out = moba_attention(q, k, v, cu_seqlens, router=router, **sizes, **settings.selection.settings, **pack)
    if padded:
        out = out.new_zeros(batch * length, *out.shape[1:]).index_copy(0, real, out)
    return out.unflatten(0, (batch, length))


def _is_one_step(stretches: list[Segment], shape: torch.Size) -> bool:
    """Whether this is one new token in every row, all rows alike: no padding, or the same."""
    alike = {(s.first, s.past) for s in stretches}
    return shape[2] == 1 and len(stretches) == shape[0] and len(alike) == 1


def _step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    s: Segment,
    settings: MoBASettings | None,
    scale: float | None,
    index: Index | None = None,
) -> Tensor:
    """One new token in every row, where all rows are as `s`: [batch, 1, N, D]."""
    k, v = (x[:, :, s.first : s.first + s.length] for x in (key, value))
    if settings is None:
        # One query needs no mask: PyTorch's kernel over all keys.
        whole = F.scaled_dot_product_attention(query, k, v, scale=scale, enable_gqa=query.shape[1] != k.shape[1])
        return whole.transpose(1, 2)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    chooses = key if index is None else index[1]
    of_text = chooses[:, :, s.first : s.first + s.length].transpose(1, 2)
    kept, selection = _summaries(chooses, settings), settings.selection
    summaries = None if kept is None else kept.of_all(of_text, s.first, settings.block_size, selection)
    sizes = {"block_size": settings.block_size, "top_k": settings.top_k, "selection": selection}
    if index is not None:
        sizes |= {"router_q_bHC": index[0][:, :, 0], "router_k_bSJC": of_text}
    return decode_tokens(query[:, :, 0], k, v, summaries, softmax_scale=scale, **sizes).unsqueeze(1)


def _continue(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    s: Segment,
    settings: MoBASettings | None,
    scale: float | None,
    index: Index | None = None,
) -> Tensor:
    """One document's new tokens, with its past in the cache: [tokens, N, D]."""
    q = query[s.row, :, s.start : s.end].transpose(0, 1)
    k, v = (x[s.row, :, s.first : s.first + s.length].transpose(0, 1) for x in (key, value))
    if settings is None:
        return continue_text(q, k, v, block_size=s.length, top_k=1, softmax_scale=scale)
    chooses = key if index is None else index[1]
    of_text = chooses[s.row, :, s.first : s.first + s.length].transpose(0, 1)
    kept, selection = _summaries(chooses, settings), settings.selection
    summaries = None
    if kept is not None:
        summaries = kept.of_row(s.row, of_text, s.first, key.shape[0], settings.block_size, selection)
    sizes = {"block_size": settings.block_size, "top_k": settings.top_k, "selection": selection}
    if index is not None:
        sizes |= {"router_q_tHC": index[0][s.row, :, s.start : s.end].transpose(0, 1), "router_k_SJC": of_text}
    return continue_text(q, k, v, summaries, softmax_scale=scale, **sizes)


def _summaries(key: Tensor, settings: MoBASettings) -> BlockSummaries | None:
    """Those that the cache keeps beside its keys, where there are such and blocks are chosen by them."""
    return getattr(key, "block_summaries", None) if settings.selection.uses_scores else None


class _NoGradient(torch.autograd.Function):
    """The identity on its first input, for an output that depends on the others without a gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *inputs: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        raise RuntimeError("MoBA has no gradient through a key/value cache: train on whole texts, with use_cache=False")
