"""Accuracy by length and depth, as in figure 7 of the MoBA report.

`python -m moba_megatron.evaluation.tasks.heat_map OUT.png NAME=RECORD.json ...` draws the records of several runs side
by side, as `evaluate --tasks` wrote them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

import typer

from moba_megatron.errors import user_errors
from moba_megatron.evaluation.plots import plain


class Place(Protocol):
    """One square of a heat map."""

    @property
    def length(self) -> int: ...

    @property
    def depth(self) -> float | None: ...

    @property
    def greedy_match(self) -> float: ...


@dataclass(frozen=True)
class StoredPlace:
    """A square from a record."""

    length: int
    depth: float
    greedy_match: float


def plot_heat_maps(title: str, maps: Mapping[str, Sequence[Place]], path: Path) -> Path:
    """Draw one heat map beside the other: length to the right, depth downward, green where every answer was right.

    Args:
        maps: squares by the name of the map; all have the same lengths and depths.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.8 + 4.2 * len(maps), 3.6), dpi=110, layout="constrained")
    axes_row = figure.subplots(1, len(maps), squeeze=False)[0]
    for axes, (name, places) in zip(axes_row, maps.items(), strict=True):
        lengths = sorted({place.length for place in places})
        depths = sorted({place.depth for place in places if place.depth is not None})
        found = {(place.length, place.depth): place.greedy_match for place in places}
        image = axes.imshow(
            [[found[length, depth] for length in lengths] for depth in depths],
            cmap="RdYlGn",
            vmin=0,
            vmax=1,
            aspect="auto",
        )
        for row, depth in enumerate(depths):
            for column, length in enumerate(lengths):
                axes.text(column, row, f"{found[length, depth]:.2f}", ha="center", va="center", fontsize=7)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set(title=plain(name), xlabel="length (tokens)")
    axes_row[0].set_ylabel("depth of the statement")
    figure.suptitle(title)
    figure.colorbar(image, ax=list(axes_row), label="greedy match")
    figure.savefig(path)
    return path


def read_places(record: Path, task: str) -> list[StoredPlace]:
    """The squares of a task from a record of `evaluate --tasks`.

    Raises:
        ValueError: not such a record, or the task has no depths there.
    """
    try:
        cells = json.loads(record.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{record} is not a record of evaluate --tasks: {type(error).__name__}: {error}") from error
    places = [
        StoredPlace(cell["length"], cell["depth"], cell["greedy_match"])
        for cell in cells
        if cell["task"] == task and cell["depth"] is not None
    ]
    if not places:
        raise ValueError(f"{record} has no depths of task {task!r}")
    return places


@user_errors()
def main(
    out: Annotated[Path, typer.Argument(help="Picture to write.")],
    records: Annotated[list[str], typer.Argument(help="NAME=RECORD.json, one for each map.")],
    task: Annotated[str, typer.Option(help="Task with depths.")] = "needle",
) -> None:
    """Draw the heat maps of several runs side by side."""
    named = [text.partition("=") for text in records]
    if not all(name and path for name, _, path in named):
        raise ValueError(f"records must be NAME=RECORD.json, not {' '.join(records)}")
    maps = {name: read_places(Path(path), task) for name, _, path in named}
    squares = {name: {(place.length, place.depth) for place in places} for name, places in maps.items()}
    if len({frozenset(found) for found in squares.values()}) > 1:
        raise ValueError(f"the records of {', '.join(maps)} have other lengths or depths: evaluate them alike")
    plot_heat_maps(task, maps, out)
    typer.echo(out)


if __name__ == "__main__":
    typer.run(main)
