"""The recipe of a blend, its views of prepared datasets, and the resulting mix for training: a table and a picture of
the lengths, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field, model_validator

from moba_megatron.config import Section
from moba_megatron.corpus.length_table import length_table
from moba_megatron.corpus.recipe import load_section


class MixSource(Section):
    path: str
    """Prefix of a prepared dataset (`PATH.bin`, `PATH.idx`), with its manifest beside it."""
    name: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    """Of its views. Default: the name of the folder."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the tokens read, relative to the other sources; given for all of them or for none. Default: its number
    of tokens."""

    @property
    def label(self) -> str:
        return self.name or Path(self.path).absolute().parent.name


class LengthRange(Section):
    at_least: int = Field(ge=1)
    """Tokens of the shortest document; the range ends where the next one begins."""
    upsample: float = Field(ge=0)
    """How many times as often as it occurs a token of these documents is read, against the other ranges of the same
    source. 0 leaves them out."""


class Mix(Section):
    """A recipe for `prepare blend`. Paths are relative to the working directory."""

    sources: list[MixSource] = Field(min_length=1)
    """What is mixed."""
    lengths: list[LengthRange] = []
    """Which lengths are read more or less often; documents shorter than the first range count once."""

    @model_validator(mode="after")
    def _distinct(self) -> Mix:
        labels = [source.label for source in self.sources]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            raise ValueError(f"two sources are called {twice!r}: give them different names (sources.N.name)")
        without = [number for number, source in enumerate(self.sources) if source.weight is None]
        if 0 < len(without) < len(self.sources):
            raise ValueError(
                f"sources.{without[0]}.weight is not given, but others are: give every source a weight, or give none "
                f"(then the weights are the numbers of tokens)"
            )
        edges = [item.at_least for item in self.lengths]
        if edges != sorted(set(edges)):
            raise ValueError(f"lengths.*.at_least = {edges} must rise")
        return self

    @property
    def ranges(self) -> list[tuple[int, int, float]]:
        """(shortest, one more than the longest, upsample) of all lengths."""
        edges = [*((1, 1.0),) * (not self.lengths or self.lengths[0].at_least > 1)]
        edges += [(item.at_least, item.upsample) for item in self.lengths]
        stops = [at_least for at_least, _ in edges[1:]] + [2**31]
        return [(start, stop, times) for (start, times), stop in zip(edges, stops, strict=True)]


@dataclass(frozen=True)
class View:
    """Some documents of a source."""

    name: str
    source: MixSource
    documents: np.ndarray
    """Their numbers in the source, rising."""
    lengths: np.ndarray
    """[documents] int32 tokens of each."""
    weight: float
    """Share of the tokens that are read."""

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))


def load_mix(path: str | Path, overrides: list[str] | None = None) -> Mix:
    """Read a recipe for a blend from YAML, with `key.path=value` overrides.

    Raises:
        ConfigError: with one line for each unknown key, wrong type or impossible value.
    """
    return load_section(Mix, path, overrides)


def make_views(mix: Mix, lengths: list[np.ndarray]) -> list[View]:
    """The views of a mix, source by source, short before long; those without documents are left out.

    Args:
        lengths: of each source, [documents] int32 tokens of its documents.

    Raises:
        ValueError: a source without any document in the ranges that are read.
    """
    tokens = [int(own.sum(dtype=np.int64)) for own in lengths]
    shares = [source.weight or float(own) for source, own in zip(mix.sources, tokens, strict=True)]
    views = []
    for source, own, share in zip(mix.sources, lengths, shares, strict=True):
        found = []
        for start, stop, times in mix.ranges:
            documents = np.flatnonzero((own >= start) & (own < stop))
            read = times * float(own[documents].sum(dtype=np.int64))
            if read:
                found.append((start, documents, read))
        if not found:
            longest = int(own.max(initial=0))
            raise ValueError(
                f"{source.path} has no document of a length in use (its longest has {longest} tokens): correct "
                "`lengths`, or leave the source out"
            )
        total = sum(read for _, _, read in found)
        views += [
            View(f"{source.label}-{start}", source, documents, own[documents], share / sum(shares) * read / total)
            for start, documents, read in found
        ]
    return views


def length_shares(views: Sequence[View]) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the tokens by document length [32] float64, as they occur in the views together and as they are read;
    item i is for documents of 2**i to 2**(i+1) - 1 tokens."""
    tables = [length_table(view.lengths)[:, 1].astype(np.float64) for view in views]
    natural = np.sum(tables, axis=0)
    read = np.sum([view.weight * table / table.sum() for view, table in zip(views, tables, strict=True)], axis=0)
    return natural / natural.sum(), read / read.sum()


def describe_mix(views: Sequence[View]) -> str:
    """The views and the resulting distribution of lengths, as text."""
    total = sum(view.tokens for view in views)
    width = max(len(view.name) for view in views)
    lines = [f"{'view':<{width}} {'documents':>11} {'tokens':>15} {'occurs':>7} {'is read':>7} {'times':>7}"]
    for view in views:
        natural = view.tokens / total
        lines.append(
            f"{view.name:<{width}} {view.documents.size:>11,} {view.tokens:>15,} {natural:>7.1%} {view.weight:>7.1%} "
            f"{view.weight / natural:>7.2f}"
        )
    natural, read = length_shares(views)
    lines.append(f"{'tokens in the document':>25} {'occurs':>7} {'is read':>7}")
    for power in np.flatnonzero(natural):
        span = f"{2**power:,} to {2 ** (power + 1) - 1:,}"
        lines.append(f"{span:>25} {natural[power]:>7.1%} {read[power]:>7.1%}")
    return "\n".join(lines)


def plot_mix(views: Sequence[View], path: Path) -> None:
    """A picture of `length_shares`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    natural, read = length_shares(views)
    powers = np.flatnonzero(natural)
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(powers + 0.3, natural[powers], width=0.4, label="as it occurs")
    axes.bar(powers + 0.7, read[powers], width=0.4, label="as it is read")
    axes.set_xticks(powers, [f"{2**power:,}" for power in powers], rotation=30)
    axes.set_xlabel("tokens in the document, at least")
    axes.set_ylabel("share of the tokens")
    axes.set_title(f"{sum(view.tokens for view in views):,} tokens in {len(views)} views")
    axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))
