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
over up.

Nothing is permuted for the rotary embedding: both sides rotate channel i with channel i + D / 2.

Parameters have the names of megatron-core's checkpoints, `decoder.layers.N.` with N counted from 0 over the whole
model. Layers without Transformer Engine name their norms otherwise; `canonical_name` translates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from moba_megatron.config import ConfigError, ModelConfig

EMBEDDING, OUTPUT, FINAL_NORM = (
    "embedding.word_embeddings.weight",
    "output_layer.weight",
    "decoder.final_layernorm.weight",
)
_LOCAL_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
KEY_FILTERS = "self_attention.key_convolution.weight"
_WHOLE = {
    KEY_FILTERS: "self_attn.k_conv.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
}
_LAYER = "decoder.layers."


@dataclass(frozen=True)
class Piece:
    """A rectangle that a Hugging Face tensor and a Megatron parameter share.

    Attributes:
        source: name of the Hugging Face tensor.
        there: slices of that tensor, for its first dimensions.
        here: slices of the parameter, for the same dimensions.
    """

    source: str
    there: tuple[slice, ...] = ()
    here: tuple[slice, ...] = ()


def canonical_name(name: str, first_layer: int) -> str:
    """The checkpoint's name of a parameter of a model chunk.

    Args:
        name: as `named_parameters` gives it; chunks count their layers from 0.
        first_layer: layers of the model before this chunk.

    >>> canonical_name("decoder.layers.1.input_layernorm.weight", first_layer=8)
    'decoder.layers.9.self_attention.linear_qkv.layer_norm_weight'
    """
    if not name.startswith(_LAYER):
        return name
    number, rest = name.removeprefix(_LAYER).split(".", 1)
    return f"{_LAYER}{int(number) + first_layer}.{_LOCAL_NORMS.get(rest, rest)}"


def layer_of(name: str) -> tuple[int | None, str]:
    """The layer of a canonical name and the rest of it; None and the name itself outside the layers."""
    if not name.startswith(_LAYER):
        return None, name
    number, rest = name.removeprefix(_LAYER).split(".", 1)
    return int(number), rest


def refuse_experts(model: ModelConfig) -> None:
    """Raise ConfigError for a mixture of experts, whose weights have no names here yet."""
    if model.num_moe_experts is not None:
        raise ConfigError([
            f"model.num_moe_experts = {model.num_moe_experts}: weights of mixtures of experts are neither imported nor "
            "exported yet, nor taken by model.init_from; resume the run itself"
        ])  # fmt: skip


def parameter_shapes(model: ModelConfig, key_convolution: int | None = None) -> dict[str, tuple[int, ...]]:
    """Every parameter of the whole model by canonical name, in the order of the model.

    Args:
        model: with `vocab_size` set.
        key_convolution: width of the filters of keys.

    Raises:
        ConfigError: for a mixture of experts.
    """
    refuse_experts(model)
    hidden, ffn, size = model.hidden_size, model.ffn_size, model.head_size
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
    layer |= {
        "self_attention.linear_proj.weight": (hidden, heads * size),
        "mlp.linear_fc1.layer_norm_weight": (hidden,),
        "mlp.linear_fc1.weight": (2 * ffn, hidden),
        "mlp.linear_fc2.weight": (hidden, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (model.vocab_size, hidden)}
    shapes |= {f"{_LAYER}{n}.{name}": shape for n in range(model.num_layers) for name, shape in layer.items()}
    shapes[FINAL_NORM] = (hidden,)
    if not model.share_embeddings_and_output_weights:
        shapes[OUTPUT] = (model.vocab_size, hidden)
    return shapes


def huggingface_shapes(model: ModelConfig, *, fused: bool = False) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face model of this shape, in the order of the model."""
    shapes = {}
    for name, shape in parameter_shapes(model).items():
        parts = pieces(name, model, fused=fused)
        for source in dict.fromkeys(piece.source for piece in parts):
            rows = {piece.there[0].stop for piece in parts if piece.source == source and piece.there}
            shapes[source] = (max(rows), *shape[1:]) if rows else shape
    return shapes


def pieces(name: str, model: ModelConfig, rank: int = 0, ranks: int = 1, *, fused: bool = False) -> list[Piece]:
    """What a parameter (by canonical name) shares with Hugging Face tensors, on one of `ranks` tensor-parallel ranks.

    Rows of the vocabulary's padding are in no piece. `fused`: for a family with fused tensors.

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
        return list(_by_key_head(prefix + "self_attn.", rest.rsplit(".", 1)[1], model, rank, ranks, fused))
    if rest == "mlp.linear_fc1.weight":
        return list(_gate_and_up(prefix + "mlp.", model.ffn_size, rank, ranks, fused))
    if rest == "mlp.linear_fc2.weight":
        return [_columns(prefix + "mlp.down_proj.weight", model.hidden_size, model.ffn_size // ranks, rank)]
    if rest == "self_attention.linear_proj.weight":
        columns = model.num_attention_heads * model.head_size // ranks
        return [_columns(prefix + "self_attn.o_proj.weight", model.hidden_size, columns, rank)]
    raise ValueError(f"parameter {name} has no counterpart in Hugging Face models")


def _columns(source: str, rows: int, columns: int, rank: int) -> Piece:
    everything = slice(0, rows)
    return Piece(source, (everything, slice(rank * columns, (rank + 1) * columns)), (everything, slice(0, columns)))


def _vocabulary(source: str, entries: int, rank: int, ranks: int) -> Iterator[Piece]:
    rows = -(-entries // ranks)
    begin, end = rank * rows, min((rank + 1) * rows, entries)
    if begin < end:
        yield Piece(source, (slice(begin, end),), (slice(0, end - begin),))


def _gate_and_up(prefix: str, size: int, rank: int, ranks: int, fused: bool) -> Iterator[Piece]:
    rows = size // ranks
    for number, part in enumerate(("gate", "up")):
        first = rank * rows + (number * size if fused else 0)
        name = "gate_up" if fused else part
        here = slice(number * rows, (number + 1) * rows)
        yield Piece(f"{prefix}{name}_proj.weight", (slice(first, first + rows),), (here,))


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
