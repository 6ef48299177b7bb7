"""What a blend will make training read: a table and a picture of the lengths, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from moba_megatron.data.mix import View


def length_shares(views: Sequence[View]) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the tokens by document length [32] float64, as they occur in the views together and as they are read;
    item i is for documents of 2**i to 2**(i+1) - 1 tokens."""
    tables = [
        np.bincount(np.log2(view.lengths).astype(np.int64), view.lengths.astype(np.float64), minlength=32)
        for view in views
    ]
    natural = np.sum(tables, axis=0)
    read = np.sum([view.weight * table / table.sum() for view, table in zip(views, tables, strict=True)], axis=0)
    return natural / natural.sum(), read / read.sum()


def describe_mix(views: Sequence[View]) -> str:
    """The views and the resulting distribution of lengths, in words."""
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
