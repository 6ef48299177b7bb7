"""Which attentions of the same weights an evaluation runs: what `--attention` means, for every part of it."""

from __future__ import annotations

from typing import Literal

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
