"""Which part of a Hugging Face tensor is which part of a Megatron parameter.

Both hold the same numbers in different arrangement. `pieces` lists, for a parameter as one tensor-parallel rank has it,
the rectangles it shares with Hugging Face tensors; import copies them one way, export (as rank 0 of 1) the other.

The arrangements, with N query heads and G key heads of D channels:

- `linear_qkv` goes by key head: the N / G query heads that share it, its key, its value; biases likewise. A rank has
  whole key heads.
- `linear_fc1` is gate over up; a rank has its rows of gate over its rows of up.
- `linear_proj` and `linear_fc2` are split by columns, embedding and output layer by rows of the vocabulary, whose
  number is rounded up to a multiple of the ranks. Norms are whole on every rank.

Families with fused tensors (`config.families`) have one for queries, keys and values, in this order, and one for gate
over up. How a mixture of experts is arranged stands in `expert_mapping`; an `Arrangement` says which of these it is.

Nothing is permuted for the rotary embedding: both sides rotate channel i with channel i + D / 2.

Parameters have the names of megatron-core's checkpoints, `decoder.layers.N.` with N counted from 0 over the whole
model. Layers without Transformer Engine name their norms otherwise, and so do mixtures of experts with it; experts are
named as layers without it do, `mlp.experts.local_experts.N.`, with N counted over all ranks. `canonical_name`
translates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from moba_megatron.config import ModelConfig
from moba_megatron.convert.expert_mapping import expert_pieces, expert_shapes, is_expert
from moba_megatron.convert.indexes import INDEX_TENSORS, Indexes
from moba_megatron.convert.piece import APART, Arrangement, Piece, columns, gate_and_up
from moba_megatron.model.first_weights import in_whole_layer

EMBEDDING, OUTPUT, FINAL_NORM = (
    "embedding.word_embeddings.weight",
    "output_layer.weight",
    "decoder.final_layernorm.weight",
)
MLP_NORM = "mlp.linear_fc1.layer_norm_weight"
LOCAL_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": MLP_NORM,
}
KEY_FILTERS = "self_attention.key_convolution.weight"
_WHOLE = {
    KEY_FILTERS: "self_attn.k_conv.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    MLP_NORM: "post_attention_layernorm.weight",
    **INDEX_TENSORS,
}
_LAYER = "decoder.layers."


def canonical_name(name: str, first_layer: int, first_expert: int = 0) -> str:
    """The checkpoint's name of a parameter of a model chunk.

    Args:
        name: as `named_parameters` gives it; chunks count their layers from 0.
        first_layer: layers of the model before this chunk.
        first_expert: number in its layer of the first expert that this rank has.

    >>> canonical_name("decoder.layers.1.input_layernorm.weight", first_layer=8)
    'decoder.layers.9.self_attention.linear_qkv.layer_norm_weight'
    """
    if not name.startswith(_LAYER):
        return name
    number, rest = name.removeprefix(_LAYER).split(".", 1)
    return f"{_LAYER}{int(number) + first_layer}.{in_whole_layer(LOCAL_NORMS.get(rest, rest), first_expert)}"


def layer_of(name: str) -> tuple[int | None, str]:
    """The layer of a canonical name and the rest of it; None and the name itself outside the layers."""
    if not name.startswith(_LAYER):
        return None, name
    number, rest = name.removeprefix(_LAYER).split(".", 1)
    return int(number), rest


def parameter_shapes(
    model: ModelConfig, key_convolution: int | None = None, indexes: Indexes | None = None
) -> dict[str, tuple[int, ...]]:
    """Every parameter of the whole model by canonical name, in the order of the model.

    Args:
        model: with `vocab_size` set.
        key_convolution: width of the filters of keys.
        indexes: of its blocks.
    """
    hidden = model.hidden_size
    attention = _attention_shapes(model, key_convolution)
    dense = {"mlp.linear_fc1.weight": (2 * model.ffn_size, hidden), "mlp.linear_fc2.weight": (hidden, model.ffn_size)}
    experts = expert_shapes(model)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (model.vocab_size, hidden)}
    for number, has_experts in enumerate(model.expert_layers):
        index = indexes.shapes(model, number) if indexes else {}
        layer = {**attention, **index, MLP_NORM: (hidden,), **(experts if has_experts else dense)}
        shapes |= {f"{_LAYER}{number}.{name}": shape for name, shape in layer.items()}
    shapes[FINAL_NORM] = (hidden,)
    if not model.share_embeddings_and_output_weights:
        shapes[OUTPUT] = (model.vocab_size, hidden)
    return shapes


def _attention_shapes(model: ModelConfig, key_convolution: int | None) -> dict[str, tuple[int, ...]]:
    hidden, size = model.hidden_size, model.head_size
    heads, groups = model.num_attention_heads, model.query_groups
    layer: dict[str, tuple[int, ...]] = {
        "self_attention.linear_qkv.layer_norm_weight": (hidden,),
        "self_attention.linear_qkv.weight": ((heads + 2 * groups) * size, hidden),
    }
    if model.add_qkv_bias:
        layer["self_attention.linear_qkv.bias"] = ((heads + 2 * groups) * size,)
    if model.qk_layernorm:
        layer |= {"self_attention.q_layernorm.weight": (size,), "self_attention.k_layernorm.weight": (size,)}
    if key_convolution:
        layer[KEY_FILTERS] = (groups * size, key_convolution)
    return layer | {"self_attention.linear_proj.weight": (hidden, heads * size)}


def parameter_counts(model: ModelConfig) -> tuple[int, int]:
    """Parameters in all, and those that one token passes: of each layer's experts the chosen ones."""
    total = routed = 0
    for name, shape in parameter_shapes(model).items():
        total += math.prod(shape)
        routed += math.prod(shape) if is_expert(name) else 0
    experts = model.num_moe_experts or 1
    return total, total - routed * (experts - min(model.moe_router_topk, experts)) // experts


def huggingface_shapes(
    model: ModelConfig, arrangement: Arrangement = APART, indexes: Indexes | None = None
) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face model of this shape, in the order of the model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in parameter_shapes(model, indexes=indexes).items():
        for piece in pieces(name, model, arrangement=arrangement):
            ends = [part + 1 if isinstance(part, int) else part.stop for part in piece.there]
            # The parameter has all dimensions of the tensor but those in which it is one of several.
            own = sum(not isinstance(part, int) for part in piece.there)
            reaches = (*ends, *shape[own:])
            shapes[piece.source] = tuple(map(max, reaches, shapes.get(piece.source, reaches)))
    return shapes


def pieces(
    name: str, model: ModelConfig, rank: int = 0, ranks: int = 1, *, arrangement: Arrangement = APART
) -> list[Piece]:
    """The parts that a parameter (by canonical name) shares with Hugging Face tensors, on one of `ranks` ranks that
    split it: tensor-parallel ones, or of an expert those that share it.

    Rows of the vocabulary's padding are in no piece.

    Raises:
        ValueError: a parameter that this model does not have.
    """
    layer, rest = layer_of(name)
    if layer is None:
        if name == FINAL_NORM:
            return [Piece("model.norm.weight")]
        tied = model.share_embeddings_and_output_weights
        table = {
            EMBEDDING: "model.embed_tokens.weight",
            OUTPUT: f"{'model.embed_tokens' if tied else 'lm_head'}.weight",
        }
        if name in table:
            return list(_vocabulary(table[name], model.vocab_size, rank, ranks))
        raise ValueError(f"parameter {name} has no counterpart in Hugging Face models")
    prefix = f"model.layers.{layer}."
    if rest in _WHOLE:
        return [Piece(prefix + _WHOLE[rest])]
    if rest in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"):
        kind = rest.rsplit(".", 1)[1]
        return list(_by_key_head(prefix + "self_attn.", kind, model, rank, ranks, arrangement.fused))
    if rest == "self_attention.linear_proj.weight":
        size = model.num_attention_heads * model.head_size // ranks
        return [columns(prefix + "self_attn.o_proj.weight", model.hidden_size, size, rank)]
    if rest == "mlp.linear_fc1.weight":
        return list(gate_and_up(prefix + "mlp.", model.ffn_size, rank, ranks, arrangement.fused))
    if rest == "mlp.linear_fc2.weight":
        return [columns(prefix + "mlp.down_proj.weight", model.hidden_size, model.ffn_size // ranks, rank)]
    found = expert_pieces(prefix, rest, model, rank, ranks, arrangement)
    if not found:
        raise ValueError(f"parameter {name} has no counterpart in Hugging Face models")
    return found


def _vocabulary(source: str, entries: int, rank: int, ranks: int) -> Iterator[Piece]:
    rows = -(-entries // ranks)
    begin, end = rank * rows, min((rank + 1) * rows, entries)
    if begin < end:
        yield Piece(source, (slice(begin, end),), (slice(0, end - begin),))


def _by_key_head(prefix: str, kind: str, model: ModelConfig, rank: int, ranks: int, fused: bool) -> Iterator[Piece]:
    size, groups = model.head_size, model.query_groups // ranks
    queries = model.num_attention_heads // model.query_groups * size
    # Rows of the fused tensor before those of each part.
    before = {
        "q": 0,
        "k": model.num_attention_heads * size,
        "v": (model.num_attention_heads + model.query_groups) * size,
    }
    row = 0
    for group in range(rank * groups, (rank + 1) * groups):
        for part, rows in (("q", queries), ("k", size), ("v", size)):
            first = group * rows + (before[part] if fused else 0)
            name = "qkv" if fused else part
            yield Piece(f"{prefix}{name}_proj.{kind}", (slice(first, first + rows),), (slice(row, row + rows),))
            row += rows
