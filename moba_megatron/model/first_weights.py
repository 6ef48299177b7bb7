"""Drawn weights that do not depend on the layout: every rank replays the draws of one rank and keeps its part.

One rank draws its weights one after the other from one stream of random numbers. megatron-core gives each tensor- and
pipeline-parallel rank a stream of its own, so that the same seed starts another model at another layout. Here each rank
goes through all parameters of the whole model in the order in which one rank draws them, draws each as a whole on the
device that holds its own, and copies its part of those that it has. One parameter is in memory at a time. What is not
drawn (norms, biases, filters of keys) is constant, and megatron-core has set it.

The random streams of the process are left as they are. A CPU and a GPU draw different numbers from the same seed, and
so do GPUs of different kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from moba_megatron.config import ModelConfig

_EMBEDDING, _OUTPUT, _LAYER = "embedding.word_embeddings.weight", "output_layer.weight", "decoder.layers."
# In the order in which megatron-core 0.16 builds a layer.
_OF_A_LAYER = (
    *("self_attention.linear_proj.weight", "self_attention.linear_qkv.weight"),
    *("mlp.linear_fc1.weight", "mlp.linear_fc2.weight"),
)
_NOT_DRAWN = "key_convolution.weight"
# From the seed of a run to that of megatron-core's stream for weights, on the first tensor-parallel rank.
_STREAM = 2718


@torch.no_grad()
def replay_draws(
    chunks: list[torch.nn.Module],
    model: ModelConfig,
    transformer: TransformerConfig,
    *,
    vocab_size: int,
    seed: int,
    rank: int,
    ranks: int,
) -> None:
    """Give the model chunks of this rank the weights that one rank would draw. Not collective.

    Args:
        chunks: bare model chunks, before an optimizer copies their weights.
        transformer: what they were built with.
        vocab_size: entries of the vocabulary, without padding, whose rows become 0.
        seed: of the run.
        rank, ranks: tensor-parallel.

    Raises:
        ValueError: a parameter of which it is not known here how one rank draws it.
    """
    mine = _own_parameters(chunks)
    if not mine:  # a stage in the middle of the pipeline may have no layer at all
        return
    some = next(iter(next(iter(mine.values()))))
    generator = torch.Generator(some.device).manual_seed(seed + _STREAM)
    for name, shape, init, cut in _draws(chunks, model, transformer, vocab_size):
        whole = torch.empty(shape, dtype=some.dtype, device=some.device)
        init(whole, generator=generator)
        for parameter in mine.pop(name, ()):
            part = cut(whole, rank, ranks)
            parameter.zero_()
            parameter[: len(part)] = part
    if mine:
        raise ValueError(f"how one rank draws {', '.join(mine)} is not known: start from weights (model.init_from)")


def _own_parameters(chunks: list[torch.nn.Module]) -> dict[str, list[torch.nn.Parameter]]:
    """The parameters of this rank that are drawn, by their names in the whole model."""
    found: dict[str, list[torch.nn.Parameter]] = {}
    for chunk in chunks:
        numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        tied = chunk.share_embeddings_and_output_weights
        for name, parameter in chunk.named_parameters():
            if parameter.dim() < 2 or name.endswith(_NOT_DRAWN):
                continue
            if name.startswith(_LAYER):
                local, rest = name.removeprefix(_LAYER).split(".", 1)
                name = f"{_LAYER}{numbers[int(local)]}.{rest}"
            # The last pipeline stage has a copy of a tied embedding.
            found.setdefault(_EMBEDDING if tied and name == _OUTPUT else name, []).append(parameter)
    return found


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
    for number in range(model.num_layers):
        for name in _order(chunks):
            yield f"{_LAYER}{number}.{name}", *of_a_layer[name]
    if not model.share_embeddings_and_output_weights:
        yield _OUTPUT, (vocab_size, hidden), init, _rows


def _order(chunks: list[torch.nn.Module]) -> list[str]:
    """Drawn parameters of a layer in the order in which it was built, which is that of its modules."""
    layer = next((layer for chunk in chunks for layer in chunk.decoder.layers), None)
    if layer is None:
        return list(_OF_A_LAYER)
    return [name for name, _ in layer.named_parameters() if name in _OF_A_LAYER]


def _rows(whole: Tensor, rank: int, ranks: int) -> Tensor:
    """Rows of this rank; fewer on the last ones where they do not divide, which only a vocabulary does."""
    share = -(-len(whole) // ranks)
    return whole[rank * share : (rank + 1) * share]


def _columns(whole: Tensor, rank: int, ranks: int) -> Tensor:
    return whole.chunk(ranks, dim=1)[rank]


def _rows_of_both_halves(whole: Tensor, rank: int, ranks: int) -> Tensor:
    """Gate over up: this rank's rows of one over its rows of the other."""
    return torch.cat([_rows(half, rank, ranks) for half in whole.chunk(2)])
