"""The picture of one layer's routing."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_layer(record: dict[str, Any], path: Path) -> Path:
    """Draw a layer's record (`layer_record`): how often each distance is chosen, the mass that each head's choice
    holds, and the mass of other choices."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6), dpi=90, layout="constrained")
    distances, heads, choices = figure.subplots(1, 3, width_ratios=[1.2, 1, 1])
    figure.suptitle(f"layer {record['layer']}: {record['attention']}")
    _draw_distances(figure, distances, record)
    _draw_heads(heads, record)
    _draw_choices(choices, record)
    figure.savefig(path)
    return path


def _draw_distances(figure: Any, axes: Any, record: dict[str, Any]) -> None:
    shares = record["chosen_at_distance"]
    right = len(shares[0]) + 0.5
    image = axes.imshow(
        shares, aspect="auto", vmin=0, vmax=1, cmap="viridis", extent=(0.5, right, len(shares) + 0.5, 0.5)
    )
    axes.set(xlabel="distance (blocks)", ylabel="head", title="share of queries that choose it")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes)


def _draw_heads(axes: Any, record: dict[str, Any]) -> None:
    own = record["choices"][0]
    heads = range(1, len(own["held"]) + 1)
    axes.bar(heads, own["held"], color="tab:blue", label="held")
    axes.plot(heads, own["best"], "_", color="black", markersize=14, label="best of as many")
    axes.plot(heads, own["nearest"], "x", color="tab:red", label="nearest")
    axes.set(xlabel="head", title="mass of full attention", ylim=(0, 1.02))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="lower right", fontsize=8)


def _draw_choices(axes: Any, record: dict[str, Any]) -> None:
    """Every choice as a row, the layer's own on top."""
    names = [choice["choice"] for choice in record["choices"]][::-1]
    means = [sum(choice["held"]) / len(choice["held"]) for choice in record["choices"]][::-1]
    colours = ["tab:grey", *["tab:green"] * (len(names) - 2), "tab:blue"]
    bars = axes.barh(names, means, color=colours)
    axes.bar_label(bars, fmt="{:.2f}", padding=-32, color="white")
    axes.set(xlim=(0, 1), title="blue: own, green: equal cost, grey: twice")
