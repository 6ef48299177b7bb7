"""The attentions that an evaluation runs with the same weights: the meaning of `--attention` and of the choices, for
every part of it."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from moba_megatron.model.schedule import FULL, LayerAttention
from moba_megatron.ops.selection import MOBA, Selection

Attention = Literal["moba", "full"]


def chosen_attentions(
    asked: str | None, has_moba: bool, unasked: Literal["moba", "full", "both"] = "both"
) -> list[Attention]:
    """The attentions to evaluate under, MoBA first.

    Args:
        asked: `moba`, `full`, `both`, or None.
        has_moba: whether any layer of the model attends by MoBA.
        unasked: what None means for a model that has MoBA layers.

    Raises:
        ValueError: another word, or MoBA asked of a model without it.

    >>> chosen_attentions(None, True), chosen_attentions(None, True, "moba"), chosen_attentions(None, False)
    (['moba', 'full'], ['moba'], ['full'])
    """
    if asked not in (None, "moba", "full", "both"):
        raise ValueError(f"--attention {asked}: moba, full or both")
    if not has_moba:
        if asked in ("moba", "both"):
            raise ValueError(f"--attention {asked}: no layer of this model attends by MoBA; use full")
        return ["full"]
    choice = asked or unasked
    return ["moba", "full"] if choice == "both" else [choice]


def parse_choice(option: str, text: str) -> LayerAttention:
    """MoBA with sizes, and a selector, a summary or a sharing of heads, that are not a model's own.

    >>> str(parse_choice("--routing-choice", "128:4")), str(parse_choice("--losses-choice", "32:3:recent"))
    ('moba B=128 K=4', 'moba B=32 K=3 recent')

    Raises:
        ValueError: not a block size and a top-k above 1, or a selection that needs more words.
    """
    match = re.fullmatch(r"(\d+):(\d+)(?::(\w+))?", text)
    if not match or int(match[1]) < 1 or int(match[2]) < 2:
        raise ValueError(f"{option} {text}: a block size and a top-k of at least 2, such as 512:3 or 512:3:recent")
    try:
        selection = MOBA if match[3] is None else Selection.of_word(match[3])
    except ValueError as error:
        raise ValueError(f"{option} {text}: {error}") from error
    return LayerAttention("moba", int(match[1]), int(match[2]), selection)


@dataclass(frozen=True)
class LossesChoice:
    """An attention for some layers, or all: what the same weights lose under it; the other layers attend fully.

    Attributes:
        attention: how these layers attend.
        ranges: first and last layer of each range, from 0; none: all layers.
    """

    attention: LayerAttention
    ranges: tuple[tuple[int, int], ...] = ()

    def layers(self, num_layers: int) -> tuple[LayerAttention, ...]:
        """How each layer attends.

        Raises:
            ValueError: a layer that the model does not have.
        """
        last = max((last for _, last in self.ranges), default=0)
        if last >= num_layers:
            raise ValueError(f"{self}: the model's layers are 0 to {num_layers - 1}")
        chosen = {layer for first, last in self.ranges for layer in range(first, last + 1)} or range(num_layers)
        return tuple(self.attention if layer in chosen else FULL for layer in range(num_layers))

    def __str__(self) -> str:
        ranges = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in self.ranges)
        return f"{self.attention} in layers {ranges}" if ranges else str(self.attention)


def parse_losses_choice(text: str) -> LossesChoice:
    """A choice of `--losses-choice`.

    >>> str(parse_losses_choice("64:8:recent")), str(parse_losses_choice("128:4@0-2,7"))
    ('moba B=64 K=8 recent', 'moba B=128 K=4 in layers 0-2,7')
    >>> [str(layer) for layer in parse_losses_choice("128:4@1").layers(3)]
    ['full', 'moba B=128 K=4', 'full']

    Raises:
        ValueError: not as `parse_choice` wants it, with layers such as `@5` or `@0-26,29`, or without.
    """
    option = "--losses-choice"
    words, _, layers = text.partition("@")
    ranges = []
    for part in layers.split(",") if "@" in text else []:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"{option} {text}: after @ come layers, counted from 0, such as 5 or 0-26,29")
        ranges.append((int(match[1]), int(match[2] or match[1])))
    return LossesChoice(parse_choice(option, words), tuple(ranges))


def index_chooses(selection: Selection, trained: str = "none") -> bool:
    """Whether an index makes a choice. It scores means, for each head by itself, or for those of a key head together if
    it was trained so; what asks for something else is left to the attention's own queries and keys.

    Args:
        trained: the model's own `share_selection`.

    >>> [index_chooses(Selection.of_word(word)) for word in ("top_k", "min_max", "share_mean", "recent")]
    [True, False, False, False]
    """
    return selection.uses_means and (not selection.shared or trained != "none")


def chosen_by(choice: LossesChoice, indexed: Collection[int], num_layers: int, trained: str = "none") -> str:
    """What chooses the blocks, in a model with an index in some layers.

    Args:
        indexed: layers that have one, from 0.
        trained: as for `index_chooses`.

    >>> [chosen_by(parse_losses_choice(text), range(3), 4) for text in ("16:3@1", "16:3", "16:3@3")]
    ['by the index', 'by the index; by own keys in layers 3', 'by own keys']
    >>> [chosen_by(parse_losses_choice(text), range(3), 4) for text in ("16:3:min_max", "16:3:recent")]
    ['by own keys', 'by position']
    """
    selection = choice.attention.selection
    if not selection.uses_scores:
        return "by position"
    sparse = [number for number, layer in enumerate(choice.layers(num_layers)) if layer.kind == "moba"]
    others = [str(number) for number in sparse if number not in indexed]
    if not index_chooses(selection, trained) or len(others) == len(sparse):
        return "by own keys"
    return f"by the index; by own keys in layers {','.join(others)}" if others else "by the index"


def words_of(choice: LayerAttention | LossesChoice) -> str:
    """A choice in records, as `choice`.

    >>> words_of(parse_losses_choice("32:3:recent"))
    'B=32 K=3 recent'
    """
    return str(choice).removeprefix("moba ")


def as_file_name(words: str) -> str:
    """Words of a record's `choice` within the name of a file.

    >>> as_file_name("B=32 K=3 in layers 0-2,7")
    'B32_K3_in_layers_0-2_7'
    """
    return words.replace("=", "").replace(" ", "_").replace(",", "_")
