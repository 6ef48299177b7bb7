"""`moba-megatron evaluate TARGET --tasks ...`: synthetic long-range tasks at chosen lengths and depths."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moba_megatron.evaluation.progress import shown
from moba_megatron.evaluation.tasks.asked import Asked, from_huggingface
from moba_megatron.evaluation.tasks.compose import make_samples
from moba_megatron.evaluation.tasks.haystack import Haystack, load_haystack
from moba_megatron.evaluation.tasks.heat_map import plot_heat_maps
from moba_megatron.evaluation.tasks.options import TaskOptions
from moba_megatron.evaluation.tasks.puzzles import TASKS
from moba_megatron.evaluation.tasks.sample import Sample
from moba_megatron.evaluation.tasks.scoring import SampleScore, score_sample
from moba_megatron.evaluation.tasks.shares import scored
from moba_megatron.runs.files import read_json
from moba_megatron.runs.records import EvaluationRecords


@dataclass(frozen=True)
class Cell:
    """Scores of one task at one length and depth, means over `samples`; see `SampleScore`."""

    task: str
    length: int
    depth: float | None
    samples: int
    greedy_match: float
    ranked_first: float
    answer_nats: float


def evaluate_tasks(asked: Asked, options: TaskOptions, records: EvaluationRecords, console: Console) -> None:
    """Scores under each attention that is asked for: a table, a record each, a heat map for each task with depths. The
    cells of other tasks that a record holds stay in it. Collective; the rank whose records are written shows them.

    Raises:
        ValueError: lengths that are over the model's window or too short for a task, no such haystack, or fewer samples
            than ranks that score them. Nothing has been scored then.
    """
    lengths = options.lengths_for(*asked.window, asked.usual)
    haystack = load_haystack(options.haystack, asked.tokenizer)
    with console.status("drawing samples"):
        samples = _samples(options, lengths, asked, haystack)
    if (count := sum(map(len, samples.values()))) < asked.share.ranks:
        raise ValueError(
            f"{count} samples for {asked.share.ranks} data-parallel ranks: start fewer processes, split the model or "
            "the sequence over more of them (--parallel), or ask for more samples (--task-samples)"
        )
    results = {attention: _score(asked, attention, samples, console) for attention in asked.attentions}
    if not records.writes:
        return
    console.print(_table(asked.title, results))
    settings = {**asdict(options), "lengths": lengths, "haystack": haystack.name, "window": asked.window[0]}
    for attention, cells in results.items():
        new = [{**asdict(cell), "haystack": haystack.name, "seed": options.seed} for cell in cells]
        path = records.write(
            "tasks",
            step=asked.step,
            tokens=asked.tokens,
            attention=attention,
            values={**settings, "cells": [*_other_cells(records, asked, attention, options.names), *new]},
            summary={"haystack": haystack.name, "samples": options.samples, **_summary(cells)},
        )
        console.print(f"  {path}")
    for picture in _plots(asked, results):
        console.print(f"  {picture}")


def _other_cells(records: EvaluationRecords, asked: Asked, attention: str, names: list[str]) -> list[dict[str, Any]]:
    """Cells of tasks with other names that this model's record holds."""
    path = records.path_of("tasks", asked.step, attention)
    cells = (read_json(path, needs=("cells",)) or {"cells": []})["cells"]
    return [cell for cell in cells if cell["task"] not in names]


def evaluate_folder_tasks(
    folder: Path,
    options: TaskOptions,
    console: Console,
    attention: str | None,
    output: Path | None = None,
    *,
    verify: bool = True,
) -> None:
    """`evaluate_tasks` on a Hugging Face folder.

    Args:
        verify: as for `load_huggingface`.

    Raises:
        ValueError, OSError: see `from_huggingface` and `evaluate_tasks`.
    """
    asked = from_huggingface(folder, attention, output, verify=verify)
    with EvaluationRecords(asked.folder) as records:
        evaluate_tasks(asked, options, records, console)


def _samples(
    options: TaskOptions, lengths: list[int], asked: Asked, haystack: Haystack
) -> dict[tuple[str, int, float | None], list[Sample]]:
    """All samples by task, length and depth, made before the first is scored, so that mistakes show at once."""
    made = {}
    for name in options.names:
        depths = options.depths if TASKS[name].has_depth else (None,)
        count = options.samples * len(options.depths) // len(depths)
        for length in lengths:
            for depth in depths:
                made[name, length, depth] = make_samples(
                    name,
                    tokenizer=asked.tokenizer,
                    length=length - asked.template,
                    count=count,
                    seed=options.seed,
                    haystack=haystack,
                    depth=depth,
                )
    return made


def _score(
    asked: Asked, attention: str, samples: dict[tuple[str, int, float | None], list[Sample]], console: Console
) -> list[Cell]:
    model = asked.attend(attention)
    every = [(place, sample) for place, group in samples.items() for sample in group]
    title, at_once = f"tasks, {attention} attention", asked.share.ranks
    found = scored(
        every,
        model,
        lambda model, item: score_sample(model, asked.tokenizer, item[1]),
        asked.share,
        lambda rounds: shown(rounds, len(every), title, console, at_once),
    )
    scores: dict[tuple[str, int, float | None], list[SampleScore]] = {place: [] for place in samples}
    for (place, _), score in zip(every, found, strict=True):
        scores[place].append(score)
    return [_cell(*place, of_place) for place, of_place in scores.items()]


def _cell(name: str, length: int, depth: float | None, scores: list[SampleScore]) -> Cell:
    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    return Cell(
        task=name,
        length=length,
        depth=depth,
        samples=len(scores),
        greedy_match=mean([score.greedy_match for score in scores]),
        ranked_first=mean([bool(score.ranked_first) for score in scores]),
        answer_nats=mean([score.answer_nats for score in scores]),
    )


def _over_depths(cells: list[Cell]) -> dict[tuple[str, int], Cell]:
    """One cell for each task and length: all depths have equally many samples."""
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.task, cell.length), []).append(cell)
    fields = ("greedy_match", "ranked_first", "answer_nats")
    return {
        key: Cell(
            *key,
            None,
            sum(cell.samples for cell in group),
            *(sum(getattr(cell, field) for cell in group) / len(group) for field in fields),
        )
        for key, group in groups.items()
    }


def _summary(cells: list[Cell]) -> dict[str, Any]:
    """Flat numbers, for one line and for curves."""
    return {
        f"{name}_{length}_{field}": getattr(cell, field)
        for (name, length), cell in _over_depths(cells).items()
        for field in ("greedy_match", "ranked_first", "answer_nats")
    }


def _table(title: str, results: dict[str, list[Cell]]) -> Table:
    """One row for each task, length and attention: narrow enough for a terminal."""
    table = Table("task", "tokens", "attention", title=title, title_justify="left")
    for heading in ("samples", "greedy match", "ranked first", "nats per token"):
        table.add_column(heading, justify="right")
    merged = {attention: _over_depths(cells) for attention, cells in results.items()}
    for name, length in next(iter(merged.values())):
        for attention, cells in merged.items():
            cell = cells[name, length]
            scores = (cell.greedy_match, cell.ranked_first, cell.answer_nats)
            table.add_row(name, f"{length:,}", attention, str(cell.samples), *(f"{score:.3f}" for score in scores))
    return table


def _plots(asked: Asked, results: dict[str, list[Cell]]) -> list[Path]:
    folder = asked.folder.plots
    folder.mkdir(parents=True, exist_ok=True)
    step = "" if asked.step is None else f"_step_{asked.step}"
    names = dict.fromkeys(cell.task for cells in results.values() for cell in cells if cell.depth is not None)
    return [
        plot_heat_maps(
            name,
            {f"{attention} attention": [c for c in cells if c.task == name] for attention, cells in results.items()},
            folder / f"tasks_{name}{step}.png",
        )
        for name in names
    ]
