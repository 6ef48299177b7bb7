"""Capture queries and keys of the attention layers while a model runs, without a change to the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from moba_megatron.evaluation.attention_choice import index_chooses
from moba_megatron.model.core_attention import MoBACoreAttention, pack_boundaries
from moba_megatron.model.index_inputs import IndexInputs
from moba_megatron.model.schedule import LayerAttention
from moba_megatron.ops import Router
from moba_megatron.ops.selection import Selection


@dataclass
class Captured:
    """What one attention layer saw of one batch.

    Attributes:
        layer: its number, from 1.
        attention: how these heads attend.
        q: [T, N, D] after rotary embedding.
        k: [T, G, D], N a multiple of G.
        cu_seqlens: [documents + 1] boundaries of the pack; None for one document.
        softmax_scale: factor on the scores before the softmax.
        first_head: number of the first of these query heads in the layer; others are those of other ranks.
        whole: how all heads of the layer attend, where that is not the same.
        index: queries and keys of the layer's index, of these heads; None where it chooses by `q` and `k`.
    """

    layer: int
    attention: LayerAttention
    q: Tensor
    k: Tensor
    cu_seqlens: Tensor | None
    softmax_scale: float
    first_head: int = 0
    whole: LayerAttention | None = None
    index: Router | None = None

    def chooser(self, selection: Selection) -> Router | None:
        """The index, where it can choose so; None: `q` and `k` do."""
        trained = (self.whole or self.attention).selection.share_selection
        return self.index if index_chooses(selection, trained) else None


@contextmanager
def capture_attention(model: list[torch.nn.Module], see: Callable[[Captured], None]) -> Iterator[None]:
    """Call `see` for every MoBA core attention of these model chunks, each time it is about to run, as long as the
    context lasts; also for those that attend fully at the moment.

    Under context parallelism these are this rank's tokens, with the boundaries of the whole padded pack. The tensors
    are the model's own: `see` must not change them, and should not keep them. Meant for forward passes without
    gradients: a pass that recomputes activations would be seen twice, so a layer that runs with gradients on raises.

    Raises:
        ValueError: at a forward pass of several sequences that are not packed, or with gradients on.
    """
    cores = [module for chunk in model for module in chunk.modules() if isinstance(module, MoBACoreAttention)]

    def hook(core: MoBACoreAttention, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        see(_captured(core, *arguments[:2], named.get("packed_seq_params"), named.get("index")))

    handles = [core.register_forward_pre_hook(hook, with_kwargs=True) for core in cores]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _captured(core: MoBACoreAttention, query: Tensor, key: Tensor, packed: Any, index: IndexInputs | None) -> Captured:
    if torch.is_grad_enabled():
        raise ValueError("attention is captured in forward passes without gradients: use torch.no_grad()")
    if packed is None and query.shape[1] != 1:
        raise ValueError(f"{query.shape[1]} sequences that are not packed: capture one at a time")
    scale = core.softmax_scale
    router = None
    if index is not None:
        router = Router(*(x if packed is not None else x[:, 0] for x in (index.query, index.key)))
    return Captured(
        layer=core.layer_number,
        attention=core.attention_of_rank(key.shape[-2]),
        q=query if packed is not None else query[:, 0],
        k=key if packed is not None else key[:, 0],
        cu_seqlens=None if packed is None else pack_boundaries(packed)[0],
        softmax_scale=query.shape[-1] ** -0.5 if scale is None else scale,
        first_head=_tensor_rank() * query.shape[-2],
        whole=core.attention,
        index=router,
    )


def _tensor_rank() -> int:
    return parallel_state.get_tensor_model_parallel_rank() if parallel_state.is_initialized() else 0
