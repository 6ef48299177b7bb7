"""The index of a layer that chooses blocks (`router: index` in `moba_config`), for models of transformers.

A MoBA layer of such a model has `self_attn.block_router`: projections of the layer's hidden states to index queries
(one for each key head, or for each query head) and index keys (one shared by all heads, or one for each key head),
normalised by head and rotated as the layer's own. A block is represented by the mean of its index keys. Attention knows
no hidden states, so hooks of the layer's `self_attn` compute the index before its forward pass, and the attention finds
it in `self_attn.block_router.inputs`, which is empty again afterwards.

A cache keeps the index keys of all tokens as if they were those of further layers, behind the model's own: whatever
happens to its rows happens to them. An index has no gradient here; it learns in training with Megatron.

This file needs torch and transformers only: exports with code of their own bring it along.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import DynamicLayer

NAME, ATTENTION = "block_router", "moba"


class RouterRMSNorm(nn.Module):
    """The norm of a head of the index."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, heads: Tensor) -> Tensor:
        return F.rms_norm(heads, self.weight.shape, self.weight, self.eps)


class BlockRouter(nn.Module):
    """The index of one layer.

    Args:
        config: of the model, with `moba_config`.
        number: of this index among those of the model, from 0: its place in a cache.
        rotary: what gives angles for heads of its size; None where the layer's own do.

    Attributes:
        inputs: index queries [batch, H, tokens, C] of the tokens at hand and index keys [batch, J, slots, C], with a
            cache of all its slots; only during the layer's attention.
        hooks: those of the layer's attention that compute them.
    """

    def __init__(self, config: Any, number: int, rotary: nn.Module | None):
        super().__init__()
        entry = config.moba_config
        key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.size, self.place = entry["router_dim"], config.num_hidden_layers + number
        heads = config.num_attention_heads if entry["router_heads"] == "query" else key_heads
        keys = 1 if entry["router_keys"] == "shared" else key_heads
        self.query = nn.Linear(config.hidden_size, heads * self.size, bias=False)
        self.key = nn.Linear(config.hidden_size, keys * self.size, bias=False)
        if entry["router_norm"] == "rms":
            self.query_norm = RouterRMSNorm(self.size, config.rms_norm_eps)
            self.key_norm = RouterRMSNorm(self.size, config.rms_norm_eps)
        self.rotary_emb = rotary
        self.inputs: tuple[Tensor, Tensor] | None = None
        self.hooks: tuple[RemovableHandle, ...] = ()

    def forward(self, hidden: Tensor, angles: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Index queries [batch, H, tokens, C] and keys [batch, J, tokens, C] of hidden states [batch, tokens, h].

        Args:
            angles: cosines and sines [batch, tokens, rotated channels]; None for a layer that is not rotated.
        """
        q, k = (project(hidden).unflatten(-1, (-1, self.size)) for project in (self.query, self.key))
        if hasattr(self, "query_norm"):
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        return (q, k) if angles is None else (rotated(q, *angles), rotated(k, *angles))

    def train(self, mode: bool = True) -> BlockRouter:
        """As of any module, and without gradients: loading gives every weight one, and ends with `eval()`."""
        self.requires_grad_(False)
        return super().train(mode)

    def keys_of_all(self, k: Tensor, cache: Any, layer: int) -> Tensor:
        """Index keys of all slots of a cache, after these were added.

        Raises:
            ValueError: a cache of another kind, or one that was filled without the index.
        """
        layers = getattr(cache, "layers", None)
        if layers is None or getattr(cache, "offloading", False) or not _grows(layers, layer):
            raise ValueError(
                f"{type(cache).__name__}: an index of blocks needs a cache that keeps all keys and grows, such as "
                "DynamicCache or moba_megatron.hf.MoBACache"
            )
        make = getattr(cache, "make_layer", DynamicLayer)
        while len(layers) <= self.place:
            layers.append(make())
        own, others = (cache.get_seq_length(number) for number in (self.place, layer))
        if own != others:
            raise ValueError(
                f"the cache has {others} tokens of layer {layer}, and index keys of {own}: it was filled under another "
                "attention; start with an empty one"
            )
        return layers[self.place].update(k, k)[0]


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [batch, H, tokens, C] with their first channels rotated, as many as there are cosines."""
    channels = cos.shape[-1]
    turned, rest = heads[..., :channels], heads[..., channels:]
    first, second = turned.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def add_block_routers(model: nn.Module) -> None:
    """Give the MoBA layers of a model their index, if `moba_config` has one and they have none yet."""
    config = model.config.get_text_config()
    entry = getattr(config, "moba_config", None)
    if not isinstance(entry, dict) or entry.get("router", "own") != "index":
        return
    kinds = entry.get("layer_types") or [ATTENTION] * config.num_hidden_layers
    places = [number for number, kind in enumerate(kinds) if kind == ATTENTION]
    rotary: tuple[nn.Module | None] | None = None
    for layer, attention in _attentions(model):
        if layer not in places or hasattr(attention, NAME):
            continue
        if rotary is None:
            rotary = _rotary_of_size(model, config, entry["router_dim"])
        attention.block_router = router = BlockRouter(config, places.index(layer), rotary[0])
        router.hooks = (
            attention.register_forward_pre_hook(_compute, with_kwargs=True),
            attention.register_forward_hook(_forget, always_call=True),
        )


def keep_block_routers(model: nn.Module, kinds: Sequence[str]) -> None:
    """Fit the indexes of a model to other kinds of layers: those that attend fully from now on lose theirs, as a folder
    that says so has no weights of it.

    Args:
        kinds: `moba` or `full` for each layer.

    Raises:
        ValueError: layers that would be MoBA and have no index. Nothing has changed then.
    """
    layers = {n: attention for n, attention in _attentions(model) if n < len(kinds)}
    without = [str(n) for n, attention in layers.items() if kinds[n] == ATTENTION and not hasattr(attention, NAME)]
    if without:
        raise ValueError(
            f"this model's blocks are chosen by an index (moba_config: router = index), and layers "
            f"{', '.join(without)}, counted from 0, have none: let them attend fully, or load weights with one there"
        )
    for number, attention in layers.items():
        if kinds[number] != ATTENTION and hasattr(attention, NAME):
            for hook in attention.block_router.hooks:
                hook.remove()
            del attention.block_router


def _attentions(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """The attention of each layer, by its number from 0."""
    for module in model.modules():
        attention = getattr(module, "self_attn", None)
        if (layer := getattr(attention, "layer_idx", None)) is not None:
            yield layer, attention


def _rotary_of_size(model: nn.Module, config: Any, size: int) -> tuple[nn.Module | None]:
    """What gives angles for heads of a size; (None,) where the model's own do."""
    if size == (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads):
        return (None,)
    own = next(module.rotary_emb for module in model.modules() if hasattr(module, "rotary_emb"))
    of_size = copy.deepcopy(config)
    of_size.head_dim = size
    return (type(own)(of_size),)


@torch.compiler.disable
def _compute(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before an attention's forward pass: its index."""
    router = attention.block_router
    router.inputs = None
    if attention.config._attn_implementation != ATTENTION:
        return
    hidden = args[0] if args else kwargs["hidden_states"]
    with torch.no_grad():
        q, k = router(hidden, _angles(attention, hidden, kwargs))
        cache = kwargs.get("past_key_values")
        router.inputs = q, k if cache is None else router.keys_of_all(k, cache, attention.layer_idx)


def _angles(attention: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    if not getattr(attention, "use_rope", True):
        return None
    rotary = attention.block_router.rotary_emb
    if rotary is None:
        return kwargs["position_embeddings"]
    if kwargs.get("position_ids") is None:
        raise ValueError("an index of blocks with heads of another size than attention's needs position_ids")
    return rotary(hidden, kwargs["position_ids"])


def _forget(attention: nn.Module, args: Any, output: Any) -> None:
    attention.block_router.inputs = None


def _grows(layers: list[Any], layer: int) -> bool:
    """Whether a cache keeps all keys of a layer; a layer that is not there yet is made as it needs to be."""
    own = layers[layer] if layer < len(layers) else None
    return own is None or (isinstance(own, DynamicLayer) and not getattr(own, "is_sliding", False))
