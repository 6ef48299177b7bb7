"""First weights of the indexes that choose blocks: drawn, or copied from the layers' own queries and keys.

They have a stream of random numbers of their own, one for each layer, so that all other weights are those of a model
without indexes, and an index is the same whatever weights it is added to. Each rank draws the whole of a weight and
keeps its rows, so the layout does not show.

A copied index chooses as MoBA does: its queries and keys are the layer's own. It needs heads of the same number and
size, and a norm where the model has one (`config.router`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from moba_megatron.model.block_router import BlockRouter, block_routers


@torch.no_grad()
def draw_indexes(routers: Iterable[BlockRouter], seed: int) -> None:
    """Give indexes random projections, and norms of 1.

    Args:
        seed: of the run.
    """
    for router in routers:
        weights = {"query": router.query.weight, "key": router.key.weight}
        generator = torch.Generator(router.query.weight.device).manual_seed((seed + 1) << 16 | router.layer_number)
        for name, weight in weights.items():
            split = name == "query" or router.settings.keys == "key"
            ranks, rank = (router.ranks, router.rank) if split else (1, 0)
            whole = weight.new_empty(len(weight) * ranks, weight.shape[1])
            router.config.init_method(whole, generator=generator)
            weight.copy_(whole.chunk(ranks)[rank])
        for norm in (router.query_norm, router.key_norm):
            if norm is not None:
                norm.weight.fill_(1.0)


@torch.no_grad()
def copy_indexes(chunks: list[torch.nn.Module]) -> None:
    """Give the indexes of model chunks the weights of the queries and keys of their layers."""
    for chunk in chunks:
        for attention in chunk.modules():
            if isinstance(attention, SelfAttention) and isinstance(
                getattr(attention, "block_router", None), BlockRouter
            ):
                _copy(attention, attention.block_router)


def _copy(attention: SelfAttention, router: BlockRouter) -> None:
    query, key = _queries_and_keys(attention, router)
    router.query.weight.copy_(query)
    router.key.weight.copy_(key)
    for norm, own in ((router.query_norm, attention.q_layernorm), (router.key_norm, attention.k_layernorm)):
        if norm is not None:
            norm.weight.copy_(own.weight)


def _queries_and_keys(attention: SelfAttention, router: BlockRouter) -> tuple[Tensor, Tensor]:
    """Rows of the layer's product for queries and for keys; it goes by key head: its queries, its key, its value."""
    groups, size = router.key_heads, router.settings.dim
    by_group = attention.linear_qkv.weight.view(groups, -1, size, attention.config.hidden_size)
    return by_group[:, :-2].flatten(0, 2), by_group[:, -2].flatten(0, 1)


def first_indexes(chunks: list[torch.nn.Module], init: str, seed: int) -> None:
    """Give the indexes of model chunks the first weights of `attention.router_init`."""
    if init == "copied":
        copy_indexes(chunks)
    else:
        draw_indexes(block_routers(chunks), seed)
