"""The plan of `prepare`, made before anything is written: inputs, parts, and the identity of the result; and names, for
people, of places in the inputs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from moba_megatron.corpus.chat import ChatTemplate
from moba_megatron.corpus.documents import MIB, Input, Part
from moba_megatron.corpus.recipe import (
    JsonlSource,
    PretrainedTokenizer,
    Recipe,
    TrainedTokenizer,
    recipe_identity,
)
from moba_megatron.corpus.sources import find_inputs, list_parts, place_name
from moba_megatron.corpus.tokenizer import Beginnings, Tokenizer
from moba_megatron.corpus.workspace import Identity, work_folder

_FORMAT, _SEGMENTED_FORMAT = 1, 2
"""To be raised when the same recipe and inputs come to give other bytes; the second for data with a loss mask."""


@dataclass
class PreparePlan:
    recipe: Recipe
    inputs: list[list[Input]]
    """Of each source."""
    parts: list[Part]
    """Of all sources, in the order of the documents."""
    identity: Identity
    left_out: list[tuple[str, str]]
    """Files and folders that are passed over, and why."""


def plan_preparation(recipe: Recipe, output: Path | None = None) -> PreparePlan:
    """List the inputs of a recipe and cut them into parts.

    Args:
        output: the folder that is to be made, which may lie within a source.

    Raises:
        ValueError: a source has nothing to read, or the tokenizer is missing.
    """
    own = () if output is None else (output, work_folder(output))
    found = [find_inputs(source, own) for source in recipe.sources]
    inputs = [items for items, _ in found]
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
        "format": _SEGMENTED_FORMAT if recipe.masked else _FORMAT,
        "recipe": recipe_identity(recipe),
        "inputs": [hashlib.blake2b(repr(items).encode(), digest_size=16).hexdigest() for items in inputs],
        "tokenizer": "trained",
    }
    if isinstance(spec, PretrainedTokenizer):
        tokenizer = Tokenizer(spec.path, spec.end_of_document)
        identity["tokenizer"] = tokenizer.fingerprint
        if spec.begin_of_document != "auto":
            beginnings(recipe, tokenizer)
    if recipe.chats:
        assert isinstance(spec, PretrainedTokenizer)
        # Refuses a template that cannot serve before any work starts.
        ChatTemplate(Path(spec.path), recipe.chat)
        identity["chat_template"] = ChatTemplate.fingerprint(spec.path)
    return PreparePlan(recipe, inputs, parts, identity, [entry for _, left_out in found for entry in left_out])


def beginnings(recipe: Recipe, tokenizer: Tokenizer) -> Beginnings:
    """Ids that documents of each kind begin with.

    Raises:
        CorpusError: the vocabulary does not have the token that the recipe names.
    """
    spec = recipe.tokenizer
    if isinstance(spec, TrainedTokenizer) or (spec.begin_of_document == "auto" and not recipe.prompts):
        return {}
    return tokenizer.beginnings(spec.begin_of_document)


class PlaceNames:
    """Names the items of a plan's parts.

    Lines of JSONL are numbered within their part. What must be added is found by reading the file once, when first
    asked for a part that does not begin at its start.
    """

    def __init__(self, plan: PreparePlan):
        self.plan = plan
        self._before: dict[str, dict[int, int]] = {}

    def of(self, part: int, number: int) -> str:
        """Name of item `number` of a part."""
        piece = self.plan.parts[part]
        source, before = self.plan.recipe.sources[piece.source], 0
        if isinstance(source, JsonlSource) and piece.start:
            (path,) = piece.names
            if path not in self._before:
                own = {other.start for other in self.plan.parts if other.names == piece.names}
                self._before[path] = lines_before(path, own)
            before = self._before[path][piece.start]
        return place_name(source, piece, number, before)


def lines_before(path: str, starts: set[int]) -> dict[int, int]:
    """How many lines of a file begin before each of these bytes. Reads the file once."""
    found, lines, position = {0: 0}, 1, 0
    with open(path, "rb") as stream:
        for start in sorted(starts - {0}):
            # A line begins after each newline among the bytes before the last one before `start`.
            while position < start - 1:
                piece = stream.read(min(MIB, start - 1 - position))
                if not piece:
                    break
                lines += piece.count(b"\n")
                position += len(piece)
            found[start] = lines
    return found
