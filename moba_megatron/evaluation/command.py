"""`moba-megatron evaluate`: the losses of a trained model on its validation data, beside the unigram baseline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from moba_megatron.checkpoint.manifest import CheckpointError
from moba_megatron.checkpoint.opened import OpenedModel, find_checkpoint, open_model, saved_config
from moba_megatron.config import Config
from moba_megatron.data.datasets import build_validation, check_validation
from moba_megatron.data.feed import rank_batches
from moba_megatron.data.manifest import load_manifest
from moba_megatron.evaluation.plots import plot_positions
from moba_megatron.evaluation.positions import Evaluation, evaluate


def evaluate_command(
    run: Annotated[
        Path, typer.Argument(help="Run folder (its newest checkpoint is used) or a checkpoint folder step_N.")
    ],
    validation: Annotated[
        str | None, typer.Option(help="Prefix of indexed data to evaluate on. Default: the run's data.validation.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Samples to evaluate. Default: as in training.")] = None,
) -> None:
    """Evaluate a trained model: validation loss, trailing loss, loss by position and the unigram baseline.

    Writes RUN/evaluation/step_N.json and RUN/plots/loss_by_position_step_N.png.
    """
    try:
        config = _with_data(saved_config(find_checkpoint(run)), validation, samples)
        data = check_validation(config)
        opened = open_model(run, data.identity["tokenizer"], data.vocab_size)
    except (CheckpointError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    console = Console(highlight=False, soft_wrap=True)
    with console.status(f"evaluating step {opened.step} on {config.evaluation.samples} samples"):
        result = _evaluate(opened, config, data.eod_id)
    _print_losses(console, opened, config, result)
    for path in _write(opened, config, result):
        console.print(f"  {path}")


def _with_data(config: Config, validation: str | None, samples: int | None) -> Config:
    if validation is None and config.data.validation is None:
        raise ValueError("the run has no data.validation: name data with --validation")
    data = config.data.model_copy(update={"validation": validation or config.data.validation})
    evaluation = config.evaluation.model_copy(update={"samples": samples or config.evaluation.samples})
    training = config.training.model_copy(update={"micro_batch_size": 1})
    return config.model_copy(update={"data": data, "evaluation": evaluation, "training": training})


def _evaluate(opened: OpenedModel, config: Config, eod_id: int) -> Evaluation:
    validation = build_validation(config)
    samples = config.evaluation.samples
    feed = rank_batches(
        validation, config, eod_id=eod_id, consumed_samples=0, num_samples=samples, device=opened.device
    )
    return evaluate(opened.model, [feed], config, samples)


def unigram_baseline(config: Config) -> float | None:
    """The unigram loss that the manifest beside the validation data records, if there is one."""
    if not isinstance(config.data.validation, str):
        return None
    manifest = load_manifest(Path(config.data.validation).parent)
    return manifest.unigram_loss if manifest else None


def _print_losses(console: Console, opened: OpenedModel, config: Config, result: Evaluation) -> None:
    table = Table("nats per token", f"{opened.folder}, step {opened.step}")
    unigram = unigram_baseline(config)
    table.add_row("unigram model", "not known: no manifest" if unigram is None else f"{unigram:.4f}")
    table.add_row("validation loss", f"{result.loss:.4f}")
    trailing = "no token there" if result.trailing_loss is None else f"{result.trailing_loss:.4f}"
    table.add_row(f"trailing loss (last {result.trailing_tokens} positions)", trailing)
    console.print(table)
    samples = f"{config.evaluation.samples} samples of {config.data.sequence_length:,}"
    console.print(f"over {result.evaluated_tokens:,} tokens in {samples}")


def _write(opened: OpenedModel, config: Config, result: Evaluation) -> list[Path]:
    folder = opened.folder
    record = folder / "evaluation" / f"step_{opened.step}.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    values = {"step": opened.step, "data": config.data.validation, "unigram_loss": unigram_baseline(config)}
    record.write_text(json.dumps({**values, **result.to_dict()}, indent=1, default=str) + "\n")
    picture = folder / "plots" / f"loss_by_position_step_{opened.step}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    plot_positions({f"step {opened.step}": result.to_dict()["by_position"]}, picture)
    return [folder, record, picture]
