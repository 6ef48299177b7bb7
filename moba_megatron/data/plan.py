"""What `prepare` is about to do, decided before anything is written: inputs, parts, and the identity of the result."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from moba_megatron.data.chat import ChatTemplate
from moba_megatron.data.documents import MIB, Input, Part
from moba_megatron.data.recipe import PretrainedTokenizer, Recipe, RowsSource, TrainedTokenizer, recipe_identity
from moba_megatron.data.sources import list_inputs, list_parts
from moba_megatron.data.tokenizer import fingerprint
from moba_megatron.data.workspace import Identity

_FORMAT = 1
"""To be raised when the same recipe and inputs come to give other bytes."""


@dataclass
class Plan:
    recipe: Recipe
    inputs: list[list[Input]]
    """Of each source."""
    parts: list[Part]
    """Of all sources, in the order of the documents."""
    identity: Identity


def make_plan(recipe: Recipe) -> Plan:
    """List the inputs of a recipe and cut them into parts.

    Raises:
        ValueError: a source has nothing to read, or the tokenizer is missing.
    """
    inputs = [list_inputs(source) for source in recipe.sources]
    total = sum(item.size for items in inputs for item in items)
    # At least 64 parts of a large corpus, so that workers end together and a kill costs little; 64 MiB at most.
    part_bytes = min(64 * MIB, max(MIB, total // 64))
    parts = [
        part
        for number, (source, items) in enumerate(zip(recipe.sources, inputs, strict=True))
        for part in list_parts(number, source, items, part_bytes)
    ]
    spec = recipe.tokenizer
    identity = {
        "format": _FORMAT,
        "recipe": recipe_identity(recipe),
        "inputs": [hashlib.blake2b(repr(items).encode(), digest_size=16).hexdigest() for items in inputs],
        "tokenizer": "trained" if isinstance(spec, TrainedTokenizer) else fingerprint(spec.path, spec.end_of_document),
    }
    if any(isinstance(source, RowsSource) and source.messages_column for source in recipe.sources):
        assert isinstance(spec, PretrainedTokenizer)
        identity["chat_template"] = ChatTemplate.fingerprint(spec.path)
    return Plan(recipe, inputs, parts, identity)
