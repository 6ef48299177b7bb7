"""Weights from a Hugging Face folder into the model chunks of a rank, at any parallel layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core import parallel_state
from torch import Tensor

from moba_megatron.config import ConfigError, ModelConfig
from moba_megatron.config.huggingface import family_of_folder
from moba_megatron.convert.expert_mapping import BIAS, is_expert
from moba_megatron.convert.indexes import Indexes
from moba_megatron.convert.mapping import KEY_FILTERS, canonical_name, huggingface_shapes, pieces
from moba_megatron.convert.piece import Arrangement
from moba_megatron.convert.safetensors_folder import SafetensorsFolder
from moba_megatron.model.block_router import is_of_index

_TIED = "lm_head.weight", "model.embed_tokens.weight"
# No plain model has filters of keys: they keep the zeros they start with, which do nothing.
_OWN = KEY_FILTERS


def open_weights(folder: str | Path, model: ModelConfig) -> SafetensorsFolder:
    """A Hugging Face folder whose tensors are exactly those of a model, and of the index that its config.json has.

    Args:
        model: with `vocab_size` set.

    Raises:
        ConfigError: with one line for each tensor that is missing, left over, in two files, of another shape or dtype.
    """
    weights = SafetensorsFolder(folder)
    if model.share_embeddings_and_output_weights and _TIED[0] in weights.shapes:
        _drop_tied_copy(weights)
    indexes = Indexes.of_folder(weights.folder)
    problems = weights.problems(huggingface_shapes(model, arrangement_of(weights), indexes))
    if problems:
        raise ConfigError([f"{weights.folder}: {line}" for line in problems])
    return weights


def arrangement_of(weights: SafetensorsFolder) -> Arrangement:
    """How the tensors of a folder are arranged: as in its family's files, experts stacked or apart."""
    return Arrangement.of(family_of_folder(weights.folder)).found_in(weights.shapes)


def _drop_tied_copy(weights: SafetensorsFolder) -> None:
    """Some tied models are stored with both copies: no harm while they are equal."""
    output, embedding = _TIED
    same = weights.shapes.get(output) == weights.shapes.get(embedding)
    if not (same and torch.equal(weights.read(output), weights.read(embedding).clone())):
        raise ConfigError([
            f"{weights.folder}: {output} differs from {embedding}, but tie_word_embeddings = true: one of them is "
            "wrong; set tie_word_embeddings: false in config.json if the model was trained with both"
        ])  # fmt: skip
    for table in (weights.shapes, weights.dtypes, weights.files):
        del table[output]


@torch.no_grad()
def read_weights(
    chunks: list[torch.nn.Module],
    weights: SafetensorsFolder,
    model: ModelConfig,
    *,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Fill the model chunks of this rank, reading its own slices only. Not collective.

    Args:
        chunks: bare model chunks (not wrapped), on any device.
        weights: what `open_weights` gave.
        model: with `vocab_size` set.
        advance: told parameters done and in all, after each.
    """
    todo = [named for chunk in chunks for named in canonical_parameters(chunk) if not _is_own(named[0], weights)]
    arrangement = arrangement_of(weights)
    for number, (name, parameter) in enumerate(todo, start=1):
        if is_of_index(name):
            _copy_index(parameter, name, weights, model)
        else:
            copy_parameter(parameter, name, weights, model, arrangement)
        advance(number, len(todo))


def _is_own(name: str, weights: SafetensorsFolder) -> bool:
    """Whether the folder has no such weight: filters of keys, and the index of a model that has none there."""
    return name.endswith(_OWN) or (is_of_index(name) and not any(is_of_index(tensor) for tensor in weights.shapes))


def _copy_index(parameter: Tensor, name: str, weights: SafetensorsFolder, model: ModelConfig) -> None:
    """Fill this rank's part of a weight of an index: all of it, or the rows of its heads."""
    (piece,) = pieces(name, model)
    rows, rank = len(parameter), parallel_state.get_tensor_model_parallel_rank()
    first = 0 if weights.shapes[piece.source][0] == rows else rank * rows
    parameter.copy_(weights.read(piece.source, (slice(first, first + rows),)))


@torch.no_grad()
def copy_parameter(
    parameter: Tensor, name: str, weights: SafetensorsFolder, model: ModelConfig, arrangement: Arrangement
) -> None:
    """Fill this rank's part of a parameter.

    Args:
        name: canonical.
        weights, model: as in `read_weights`.
        arrangement: of the weights.
    """
    filled = 0
    for piece in pieces(name, model, *rank_and_ranks(name), arrangement=arrangement):
        target = parameter[piece.here] if piece.here else parameter
        target.copy_(weights.read(piece.source, piece.there))
        filled += target.numel()
    if filled < parameter.numel():
        # Only the vocabulary has padding, at its end.
        parameter[filled // parameter[0].numel() :] = 0


def rank_and_ranks(name: str) -> tuple[int, int]:
    """This rank among those that split a parameter (by canonical name)."""
    if is_expert(name):
        ranks = parallel_state.get_expert_tensor_parallel_world_size()
        return parallel_state.get_expert_tensor_parallel_rank(), ranks
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()


def canonical_parameters(chunk: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """A chunk's weights in a checkpoint: parameters, and the biases of balanced routers, by canonical name."""
    # A chunk may hold no layer at all: the embedding or the loss alone.
    first = chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0
    experts = chunk.config.num_moe_experts or 0
    if experts:
        share = experts // parallel_state.get_expert_model_parallel_world_size()
        experts = parallel_state.get_expert_model_parallel_rank() * share
    biases = [named for named in chunk.named_buffers() if named[0].endswith(BIAS)]
    return [(canonical_name(name, first, experts), tensor) for name, tensor in (*chunk.named_parameters(), *biases)]
