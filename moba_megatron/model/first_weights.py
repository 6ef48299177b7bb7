"""Random first weights that do not depend on the layout: every rank repeats the draws of one rank and keeps its part.

One rank draws its weights one after the other from one stream of random numbers. megatron-core gives each tensor- and
pipeline-parallel rank its own stream, so the same seed starts different models at different layouts. Here each rank
draws all parameters of the whole model, in the order of one rank, on its own device. It copies its part of the
parameters that it has. One parameter is in memory at a time. Other parameters (norms, biases, filters of keys) are
constant, and megatron-core has set them.

In a mixture of experts megatron-core draws the experts from another stream, by rank, and the router from a stream of
the CPU. Here they use the same stream: the router, every expert in turn, the shared expert and its gate.

The random streams of the process are left as they are. A CPU and a GPU draw different numbers from the same seed, and
so do GPUs of different kinds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moba_megatron.config import ModelConfig
from moba_megatron.model.block_router import NAME as INDEX

_EMBEDDING, _OUTPUT, _LAYER = "embedding.word_embeddings.weight", "output_layer.weight", "decoder.layers."
# In the order in which megatron-core 0.16 builds a layer.
_OF_A_LAYER = (
    *("self_attention.linear_proj.weight", "self_attention.linear_qkv.weight"),
    *("mlp.linear_fc1.weight", "mlp.linear_fc2.weight"),
)
_ROUTER, _GATE, _SHARED = "mlp.router.weight", "mlp.shared_experts.gate_weight", "mlp.shared_experts."
# How the layers name expert N of a rank: one after the other, and as one product of Transformer Engine.
_ONE_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(?P<number>\d+)\.(?P<part>linear_fc[12])\.weight")
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(?P<part>linear_fc[12])\.weight(?P<number>\d+)")
_NOT_DRAWN = ("key_convolution.weight", f"{INDEX}.query.weight", f"{INDEX}.key.weight")
# From the seed of a run to that of megatron-core's stream for weights, on the first tensor-parallel rank.
_STREAM = 2718


@dataclass(frozen=True)
class Place:
    """This rank among those that share a layer (`tensor` of `tensors`), its experts (`expert` of `experts`), and one
    expert (`expert_tensor` of `expert_tensors`)."""

    tensor: int
    tensors: int
    expert: int
    experts: int
    expert_tensor: int
    expert_tensors: int


@torch.no_grad()
def replay_draws(
    chunks: list[torch.nn.Module],
    model: ModelConfig,
    transformer: TransformerConfig,
    *,
    vocab_size: int,
    seed: int,
    place: Place,
) -> None:
    """Give the model chunks of this rank the weights that one rank would draw. Not collective.

    Args:
        chunks: bare model chunks, before an optimizer copies their weights.
        transformer: what they were built with.
        vocab_size: entries of the vocabulary, without padding, whose rows become 0.
        seed: of the run.
        place: of this rank.

    Raises:
        ValueError: a parameter whose initialization on one rank is unknown.
    """
    local_experts = (model.num_moe_experts or 0) // place.experts
    mine = _own_parameters(chunks, first_expert=place.expert * local_experts)
    if not mine:  # a stage in the middle of the pipeline may have no layer at all
        return
    some = next(iter(next(iter(mine.values()))))
    generator = torch.Generator(some.device).manual_seed(seed + _STREAM)
    for name, shape, init, cut in _draws(chunks, model, transformer, vocab_size):
        whole = torch.empty(shape, dtype=some.dtype, device=some.device)
        init(whole, generator=generator)
        for parameter in mine.pop(name, ()):
            if ".experts." in name:
                part = cut(whole, place.expert_tensor, place.expert_tensors)
            else:
                part = cut(whole, place.tensor, place.tensors)
            parameter.zero_()
            parameter[: len(part)] = part
    if mine:
        raise ValueError(f"the first values of {', '.join(mine)} are not known: start from weights (model.init_from)")


def _own_parameters(chunks: list[torch.nn.Module], *, first_expert: int) -> dict[str, list[torch.nn.Parameter]]:
    """The parameters of this rank that are drawn, by their names in the whole model.

    Args:
        first_expert: number of this rank's first one in the whole layer.
    """
    found: dict[str, list[torch.nn.Parameter]] = {}
    for chunk in chunks:
        numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        tied = chunk.share_embeddings_and_output_weights
        for name, parameter in chunk.named_parameters():
            if parameter.dim() < 2 or name.endswith(_NOT_DRAWN):
                continue
            if name.startswith(_LAYER):
                local, rest = name.removeprefix(_LAYER).split(".", 1)
                name = f"{_LAYER}{numbers[int(local)]}.{in_whole_layer(rest, first_expert)}"
            # The last pipeline stage has a copy of a tied embedding.
            found.setdefault(_EMBEDDING if tied and name == _OUTPUT else name, []).append(parameter)
    return found


def in_whole_layer(name: str, first_expert: int) -> str:
    """The name of a parameter of a layer where all its experts are on one rank, one after the other.

    >>> in_whole_layer("mlp.experts.linear_fc1.weight1", 4)
    'mlp.experts.local_experts.5.linear_fc1.weight'
    """
    found = _ONE_EXPERT.fullmatch(name) or _GROUPED_EXPERT.fullmatch(name)
    return _expert(first_expert + int(found["number"]), found["part"]) if found else name


def _expert(number: int, part: str) -> str:
    return f"mlp.experts.local_experts.{number}.{part}.weight"


_Draw = tuple[str, tuple[int, int], Callable[..., Tensor], Callable[[Tensor, int, int], Tensor]]


def _draws(
    chunks: list[torch.nn.Module], model: ModelConfig, transformer: TransformerConfig, vocab_size: int
) -> Iterator[_Draw]:
    """Name, shape, initialisation and cut of every drawn parameter of the whole model, in the order of one rank."""
    hidden, ffn, size = model.hidden_size, model.ffn_size, model.head_size
    heads, groups = model.num_attention_heads, model.query_groups
    init, out = transformer.init_method, transformer.output_layer_init_method
    of_a_layer = {
        "self_attention.linear_proj.weight": ((hidden, heads * size), out, _columns),
        "self_attention.linear_qkv.weight": (((heads + 2 * groups) * size, hidden), init, _rows),
        "mlp.linear_fc1.weight": ((2 * ffn, hidden), init, _rows_of_both_halves),
        "mlp.linear_fc2.weight": ((hidden, ffn), out, _columns),
    }
    yield _EMBEDDING, (vocab_size, hidden), transformer.embedding_init_method, _rows
    for number, has_experts in enumerate(model.expert_layers):
        for name in _order(chunks):
            if not (has_experts and name.startswith("mlp.")):
                yield f"{_LAYER}{number}.{name}", *of_a_layer[name]
        if has_experts:
            for name, *draw in _draws_of_experts(model, transformer):
                yield f"{_LAYER}{number}.{name}", *draw
    if not model.share_embeddings_and_output_weights:
        yield _OUTPUT, (vocab_size, hidden), init, _rows


def _draws_of_experts(model: ModelConfig, transformer: TransformerConfig) -> Iterator[_Draw]:
    """As `_draws`, of what a mixture of experts has in place of a feed-forward layer."""
    hidden, experts, shared = model.hidden_size, model.num_moe_experts or 0, model.moe_shared_expert_intermediate_size
    init, out = transformer.init_method, transformer.output_layer_init_method
    yield _ROUTER, (experts, hidden), init, _whole
    for number in range(experts):
        yield _expert(number, "linear_fc1"), (2 * model.expert_ffn_size, hidden), init, _rows_of_both_halves
        yield _expert(number, "linear_fc2"), (hidden, model.expert_ffn_size), out, _columns
    if shared is not None:
        yield f"{_SHARED}linear_fc1.weight", (2 * shared, hidden), init, _rows_of_both_halves
        yield f"{_SHARED}linear_fc2.weight", (hidden, shared), out, _columns
        if model.moe_shared_expert_gate:
            yield _GATE, (1, hidden), init, _whole


def _order(chunks: list[torch.nn.Module]) -> list[str]:
    """Drawn parameters of a layer in the order in which it was built, which is that of its modules."""
    layers = (layer for chunk in chunks for layer in chunk.decoder.layers if isinstance(layer.mlp, MLP))
    layer = next(layers, None)
    if layer is None:
        return list(_OF_A_LAYER)
    return [name for name, _ in layer.named_parameters() if name in _OF_A_LAYER]


def _whole(whole: Tensor, rank: int, ranks: int) -> Tensor:
    return whole


def _rows(whole: Tensor, rank: int, ranks: int) -> Tensor:
    """Rows of this rank; fewer on the last ones where they do not divide, which only a vocabulary does."""
    share = -(-len(whole) // ranks)
    return whole[rank * share : (rank + 1) * share]


def _columns(whole: Tensor, rank: int, ranks: int) -> Tensor:
    return whole.chunk(ranks, dim=1)[rank]


def _rows_of_both_halves(whole: Tensor, rank: int, ranks: int) -> Tensor:
    """Gate over up: this rank's rows of one over its rows of the other."""
    return torch.cat([_rows(half, rank, ranks) for half in whole.chunk(2)])
