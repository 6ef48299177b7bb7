"""The meaning of `selector`, `summary` and `threshold`: how a query chooses its past blocks.

| setting | chooses | known as |
|---|---|---|
| `top_k` of `mean` | the best K - 1 by the block's mean key | MoBA; with K = 2 LongHeads' one past block |
| `top_k` of `min_max` | the best K - 1 by a bound on the score of any of the block's keys | Quest |
| `threshold` | the best until their share of the scores' softmax is reached, at most K - 1 | VMoBA |
| `recent` | the K - 1 nearest | sliding window |
| `sink_recent` | the document's first and the K - 2 nearest | attention sink |

`budgets` give each key head a K of its own (AB-Sparse, arXiv 2605.12110, gives heads block sizes of their own instead,
because they differ in what they need): a head with a smaller one than
the largest keeps the first K - 1 of its choice, which is what it would choose by that K. So attention, its kernels,
exchanges and caches see nothing but ids.

With `share_selection` the query heads of a key head choose together (as NSA and MSA do): a block's score for the key
head is the `mean` or the `max` of the scores of its query heads. Each query head is scored by itself first.

A selection is a summary, a selector and whether heads share. Other modules ask it and do not look at its words, but for
two that share nothing with it on purpose: the definition (`reference`), and the checks of a configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from moba_megatron.ops.selectors import RECENT, SINK_RECENT, TOP_K, Selector, Threshold
from moba_megatron.ops.summaries import MEAN, MIN_MAX, Summary

SELECTORS = ("top_k", "recent", "sink_recent", "threshold")
SHARES = ("none", "mean", "max")
SUMMARIES = {"mean": MEAN, "min_max": MIN_MAX}
_USE_SCORES = ("top_k", "threshold")
_WITHOUT_SETTINGS = {"top_k": TOP_K, "recent": RECENT, "sink_recent": SINK_RECENT}


@dataclass(frozen=True)
class Selection:
    """How past blocks are chosen; see the module.

    Attributes:
        selector: `top_k`, `recent`, `sink_recent` or `threshold`.
        summary: `mean` or `min_max`: what a block shows of its keys. Only `mean` where the selector looks at no scores.
        threshold: for `threshold` alone: the share of the softmax over all candidates, above 0 and up to 1.
        share_selection: `none`: each query head chooses for itself. `mean`, `max`: those of a key head choose together,
            by the mean or the largest of their scores. Only with a selector that looks at scores.
        budgets: K of each key head, its own block counted, where they are not all the same; None: all have the K that
            a call names. Beside budgets a call's K is the largest of them.

    Raises:
        ValueError: an unknown word, or settings that do not go together.
    """

    selector: str = "top_k"
    summary: str = "mean"
    threshold: float | None = None
    share_selection: str = "none"
    budgets: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.selector not in SELECTORS:
            raise ValueError(f"selector = {self.selector!r}: choose one of {', '.join(SELECTORS)}")
        if self.summary not in SUMMARIES:
            raise ValueError(f"summary = {self.summary!r}: choose one of {', '.join(SUMMARIES)}")
        if self.summary != "mean" and not self.uses_scores:
            raise ValueError(
                f"summary = {self.summary!r} has no effect with selector = {self.selector!r}, which looks at no "
                "scores: leave it out"
            )
        if self.share_selection not in SHARES:
            raise ValueError(f"share_selection = {self.share_selection!r}: choose one of {', '.join(SHARES)}")
        if self.shared and not self.uses_scores:
            raise ValueError(
                f"share_selection = {self.share_selection!r} has no effect with selector = {self.selector!r}, which "
                "looks at no scores: leave it out"
            )
        if (self.threshold is None) == (self.selector == "threshold"):
            raise ValueError(
                f"threshold = {self.threshold} with selector = {self.selector!r}: a threshold belongs to the selector "
                "'threshold', and must be given there"
            )
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold = {self.threshold}: a share above 0 and up to 1")
        if self.budgets is not None:
            object.__setattr__(self, "budgets", _checked_budgets(self.budgets))

    @classmethod
    def of_settings(
        cls, selector: str, summary: str, threshold: float | None, share_selection: str = "none"
    ) -> Selection:
        """A selector with those of the settings that it looks at.

        >>> [str(Selection.of_settings(selector, "min_max", 0.9)) for selector in SELECTORS]
        ['top_k of min_max', 'recent', 'sink_recent', 'threshold of min_max 0.9']
        """
        scored = selector in _USE_SCORES
        return cls(
            selector,
            summary if scored else "mean",
            threshold if selector == "threshold" else None,
            share_selection if scored else "none",
        )

    @classmethod
    def of_word(cls, word: str) -> Selection:
        """A selector, or under top-k a summary or `share_mean`, `share_max`.

        Raises:
            ValueError: another word, or one that does not say it all.

        >>> str(Selection.of_word("min_max")), str(Selection.of_word("share_mean"))
        ('top_k of min_max', 'top_k shared by mean')
        """
        if word.startswith("share_"):
            return cls(share_selection=word.removeprefix("share_"))
        return cls(summary=word) if word in SUMMARIES else cls(selector=word)

    @property
    def shared(self) -> bool:
        """Whether the query heads of a key head choose together."""
        return self.share_selection != "none"

    @property
    def is_plain(self) -> bool:
        """Whether this is MoBA as its report defines it: top-k of the means."""
        return self.selector == "top_k" and self.summary == "mean" and not self.shared and self.budgets is None

    @property
    def uses_scores(self) -> bool:
        """Whether queries are scored against summaries of the blocks; ids follow from positions alone otherwise."""
        return self.selector in _USE_SCORES

    @property
    def uses_means(self) -> bool:
        """Whether queries are scored against means."""
        return self.uses_scores and self.summary == "mean"

    @property
    def fills_up(self) -> bool:
        """Whether every query gets as many blocks as there are, up to K: then many enough are full attention."""
        return self.selector != "threshold"

    @property
    def with_one_budget(self) -> Selection:
        """The same for heads that all have the largest K."""
        return self if self.budgets is None else replace(self, budgets=None)

    def with_blocks(self, top_k: int | Sequence[int], kv_heads: int | None = None) -> tuple[int, Selection]:
        """What a call's `top_k` says: the largest K, and this selection with a K for each key head where they differ.

        Args:
            top_k: blocks per query, or a list of them for the key heads.
            kv_heads: how many there are, where that is known.

        Raises:
            ValueError: no whole numbers of at least 1, or another number of them than of key heads.

        >>> MOBA.with_blocks([2, 5])[0], MOBA.with_blocks([5, 5]) == MOBA.with_blocks(5)
        (5, True)
        """
        if isinstance(top_k, Sequence) and not isinstance(top_k, str):
            budgets = _checked_budgets(tuple(top_k))
            _check_count(budgets, kv_heads)
            same = len(set(budgets)) == 1
            return max(budgets), replace(self, budgets=None if same else budgets)
        if self.budgets is not None:
            _check_count(self.budgets, kv_heads)
            if top_k != max(self.budgets):
                raise ValueError(f"top_k = {top_k} beside budgets {list(self.budgets)}: give the largest of them")
        return top_k, self

    def fewest_blocks(self, top_k: int) -> int:
        """The smallest K of any head, where the largest is `top_k`."""
        return top_k if self.budgets is None else min(self.budgets)

    def blocks(self, top_k: int) -> int | tuple[int, ...]:
        """What `with_blocks` took apart: one K, or one for each key head."""
        return top_k if self.budgets is None else self.budgets

    def of_heads(self, first: int, count: int) -> Selection:
        """The selection of some of the key heads.

        >>> MOBA.with_blocks([2, 5, 3])[1].of_heads(1, 2).budgets
        (5, 3)
        """
        return self if self.budgets is None else replace(self, budgets=self.budgets[first : first + count])

    def within_budgets(self, ids_TNK: Tensor) -> Tensor:
        """Ids [T, heads, K - 1] in a selector's order with -1, in place, where a head has a smaller K."""
        if self.budgets is not None:
            heads = ids_TNK.shape[1] // len(self.budgets)
            for kv_head, number in enumerate(self.budgets):
                ids_TNK[:, kv_head * heads : (kv_head + 1) * heads, number - 1 :] = -1
        return ids_TNK

    def words(self, top_k: int) -> str:
        """K and how blocks are chosen, as short as it can be said.

        >>> MOBA.words(3), Selection("recent", budgets=(2, 3)).words(3)
        ('K=3', 'K=2,3 recent')
        """
        alike = self.with_one_budget
        numbers = ",".join(map(str, self.budgets or (top_k,)))
        return f"K={numbers}" + ("" if alike.is_plain else f" {alike}")

    @property
    def settings(self) -> dict[str, str | float | None]:
        """The arguments of `moba_attention` that say the same, `top_k` left out (see `blocks`)."""
        return {
            "selector": self.selector,
            "summary": self.summary,
            "threshold": self.threshold,
            "share_selection": self.share_selection,
        }

    def make_selector(self) -> Selector:
        """The function that yields ids."""
        return Threshold(self.threshold) if self.threshold is not None else _WITHOUT_SETTINGS[self.selector]

    def make_summary(self) -> Summary | None:
        """What a block shows of its keys; None where nothing is asked for."""
        return SUMMARIES[self.summary] if self.uses_scores else None

    def __str__(self) -> str:
        parts = [self.selector] + [f"of {self.summary}"] * (self.summary != "mean")
        parts += [str(self.threshold)] * (self.threshold is not None)
        parts += [f"shared by {self.share_selection}"] * self.shared
        if self.budgets is not None:
            parts.append(f"with {','.join(map(str, self.budgets))} blocks")
        return " ".join(parts)


def _checked_budgets(budgets: Sequence[int]) -> tuple[int, ...]:
    wrong = [k for k in budgets if isinstance(k, bool) or not isinstance(k, int) or k < 1]
    if wrong or not budgets:
        raise ValueError(f"top_k = {list(budgets)}: give an integer of at least 1 for each key head")
    return tuple(budgets)


def _check_count(budgets: tuple[int, ...], kv_heads: int | None) -> None:
    if kv_heads is not None and len(budgets) != kv_heads:
        raise ValueError(f"top_k = {list(budgets)} has {len(budgets)} entries for {kv_heads} key heads: give one each")


MOBA = Selection()
