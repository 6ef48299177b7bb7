"""`moba-megatron evaluate`: the losses of a model on its validation data, under MoBA and full attention of the same
weights, beside the unigram baseline; loss by position, and the power law that it follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Column, Table

from moba_megatron.config import Config
from moba_megatron.corpus.manifest import load_manifest
from moba_megatron.evaluation.attention_choice import (
    LossesChoice,
    as_file_name,
    chosen_by,
    index_chooses,
    words_of,
)
from moba_megatron.evaluation.losses.positions import doubling_bounds, position_totals, range_losses, summarise
from moba_megatron.evaluation.losses.power_law import fit_power_law
from moba_megatron.evaluation.plots import plot_positions
from moba_megatron.evaluation.progress import shown
from moba_megatron.evaluation.subject import Attention, Subject
from moba_megatron.runs.records import EvaluationRecords

PER_RANGE = 1024


def evaluate_losses(
    subject: Subject, records: EvaluationRecords, console: Console, choices: Sequence[LossesChoice] = ()
) -> None:
    """Losses under each attention of the subject: a record each as soon as it is known, a table, one picture of loss
    by position. Collective; the rank whose records are written shows them.

    Args:
        choices: further attentions: what the same weights would lose under them.

    Raises:
        ValueError: blocks longer than the samples, or layers that the model does not have.
    """
    length = subject.config.data.sequence_length
    for choice in choices:
        if choice.attention.block_size > length:
            raise ValueError(f"{choice}: blocks longer than the {length} tokens of a sample")
        choice.layers(subject.opened.schedule.num_layers)
    unigram = unigram_baseline(subject.config)
    ways: dict[str, Attention | LossesChoice] = {name: name for name in subject.attentions}
    ways |= {_name(subject, choice): choice for choice in choices}
    results, paths = {}, []
    for name, way in ways.items():
        results[name] = _losses(subject, name, way, console)
        if records.writes:
            paths.append(_record(subject, records, way, results[name], unigram))
    if not records.writes:
        return
    console.print(f"{subject.folder}, step {subject.step}")
    of_attentions = {name: results[name] for name in subject.attentions}
    console.print(_table(subject, of_attentions, unigram))
    for line in _below_the_table(subject, of_attentions):
        console.print(line)
    if choices:
        console.print(_table_of_choices(subject.attentions[-1], results))
    for path in paths:
        console.print(f"  {path}")
    console.print(f"  {_plot(subject, results)}")


def _name(subject: Subject, choice: LossesChoice) -> str:
    """A choice in tables: with an index in the model, also what chooses."""
    words = _chosen_by(subject, choice)
    return f"{choice} {words}" if words else str(choice)


def _chosen_by(subject: Subject, choice: LossesChoice) -> str | None:
    indexed = subject.indexed_layers
    if not indexed:
        return None
    return chosen_by(choice, indexed, subject.opened.schedule.num_layers, subject.config.attention.share_selection)


def _record(
    subject: Subject,
    records: EvaluationRecords,
    way: Attention | LossesChoice,
    result: dict[str, Any],
    unigram: float | None,
) -> Path:
    config = subject.config
    is_choice = isinstance(way, LossesChoice)
    words = [words_of(way)] if is_choice else []
    name = "" if way == subject.own_attention else f"_{as_file_name(words_of(way)) if is_choice else way}"
    if subject.other_length:
        words.insert(0, subject.other_length)
        name = f"_{as_file_name(subject.other_length)}{name}"
    common = {"data": config.data.validation, "samples": config.evaluation.samples}
    # Says that these are not the model's own sizes, or not its own length.
    result = {**common, **result, **({"choice": " ".join(words)} if words else {})}
    if is_choice and (by := _chosen_by(subject, way)):
        result["chosen"] = by
    return records.write(
        "losses",
        step=subject.step,
        tokens=subject.tokens,
        attention="moba" if is_choice else way,
        values={"unigram_loss": unigram, **result},
        summary=result,
        name=f"step_{subject.step}{name}",
    )


def unigram_baseline(config: Config) -> float | None:
    """The unigram loss that the manifest beside the validation data records, if there is one."""
    if not isinstance(config.data.validation, str):
        return None
    manifest = load_manifest(Path(config.data.validation).parent)
    return manifest.unigram_loss if manifest else None


def _losses(subject: Subject, name: str, way: Attention | LossesChoice, console: Console) -> dict[str, Any]:
    """All numbers of one attention, JSON-ready. One sample at a time; logits live in chunks only."""
    config = subject.config
    if isinstance(way, LossesChoice):
        layers = way.layers(subject.opened.schedule.num_layers)
        trained = subject.config.attention.share_selection
        subject.attend(layers, by_index=index_chooses(way.attention.selection, trained))
    else:
        subject.attend(way)
    samples = config.evaluation.samples
    batches = shown(subject.batches(samples), samples, f"losses, {name} attention", console, subject.data_parallel)
    passes = -(-samples // subject.data_parallel)
    sums_4S = position_totals(subject.opened.model, [batches], config, passes).cpu()
    sums_2S = sums_4S[:2]
    result = summarise(sums_4S, config.trailing_tokens, config.evaluation.position_buckets).to_dict()
    length = config.data.sequence_length
    bounds = sorted({*range(0, length, PER_RANGE), length})
    fit = fit_power_law(*_loss_of_position(sums_2S))
    return {
        **result,
        "by_position_1k": [asdict(part) for part in range_losses(sums_2S, bounds)],
        "power_law": fit.to_dict() if fit else None,
    }


def _loss_of_position(sums_2S: torch.Tensor) -> tuple[list[float], list[float], list[int]]:
    """What the power law is fitted to: the number of tokens that a prediction sees, itself counted, its loss and how
    many predictions there are, over ranges fine enough to bend with the curve."""
    fine = range_losses(sums_2S, doubling_bounds(sums_2S.size(1), first=1, per_octave=2))
    known = [part for part in fine if part.loss is not None]
    return [(p.start + p.end + 1) / 2 for p in known], [p.loss for p in known], [p.tokens for p in known]


def _table(subject: Subject, results: dict[str, dict[str, Any]], unigram: float | None) -> Table:
    table = Table(Column("nats per token", no_wrap=True), *(f"{name} attention" for name in results))
    baseline = "not known" if unigram is None else f"{unigram:.4f}"
    table.add_row("unigram model", *[baseline] * len(results))
    table.add_row("validation loss", *(f"{result['loss']:.4f}" for result in results.values()))
    trailing = f"trailing loss (last {subject.config.trailing_tokens} positions)"
    table.add_row(trailing, *(_number(result["trailing_loss"]) for result in results.values()))
    known = next(iter(results.values()))["by_position_log"]
    for place, part in enumerate(known):
        losses = [result["by_position_log"][place]["loss"] for result in results.values()]
        table.add_row(f"  positions {part['start']:,} to {part['end'] - 1:,}", *map(_number, losses))
    return table


def _table_of_choices(against: str, results: dict[str, dict[str, Any]]) -> Table:
    """A row for each way to attend, and how far its losses are from those of one of them."""
    name = Column("the layers attend by", no_wrap=True)
    table = Table(name, "validation loss", "trailing loss", f"minus {against}", "trailing")
    for name, result in results.items():
        losses = [result[key] for key in ("loss", "trailing_loss")]
        gaps = [
            "" if loss is None or name == against else f"{loss - other:+.4f}"
            for loss, other in zip(losses, (results[against][key] for key in ("loss", "trailing_loss")), strict=True)
        ]
        table.add_row(name, *map(_number, losses), *gaps)
    return table


def _number(loss: float | None) -> str:
    return "no token there" if loss is None else f"{loss:.4f}"


def _below_the_table(subject: Subject, results: dict[str, dict[str, Any]]) -> list[str]:
    config = subject.config
    tokens = next(iter(results.values()))["evaluated_tokens"]
    lines = [f"over {tokens:,} tokens in {config.evaluation.samples} samples of {config.data.sequence_length:,}"]
    for attention, result in results.items():
        law = result["power_law"]["formula"] if result["power_law"] else "none: it does not fall, or too few positions"
        lines.append(f"power law of the loss at position p, {attention} attention: {law}")
    return lines


def _plot(subject: Subject, results: dict[str, dict[str, Any]]) -> Path:
    other = f"_{as_file_name(subject.other_length)}" if subject.other_length else ""
    picture = subject.folder.plots / f"loss_by_position_step_{subject.step}{other}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    return plot_positions(results, picture)
