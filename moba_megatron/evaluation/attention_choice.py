"""Which attentions of the same weights an evaluation runs: what `--attention` and the choices mean, for every part of
it."""

from __future__ import annotations

import re
from typing import Literal

from moba_megatron.model.schedule import LayerAttention
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
    """MoBA with sizes, and a selector or summary, that are not a model's own.

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


def words_of(choice: LayerAttention) -> str:
    """A choice in records, as `choice`.

    >>> words_of(parse_choice("--losses-choice", "32:3:recent"))
    'B=32 K=3 recent'
    """
    return str(choice).removeprefix("moba ")


def file_name(choice: LayerAttention) -> str:
    """A choice within the name of a file.

    >>> file_name(parse_choice("--losses-choice", "32:3:recent"))
    'B32_K3_recent'
    """
    return words_of(choice).replace("=", "").replace(" ", "_")
