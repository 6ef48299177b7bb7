"""Pictures of a run: the loss over the tokens, and the last evaluation by position."""

from __future__ import annotations

import logging
from pathlib import Path

from moba_megatron.evaluation.losses.curves import draw_losses
from moba_megatron.evaluation.plots import new_figure, plot_positions
from moba_megatron.runs.files import read_json_lines
from moba_megatron.runs.folder import RunFolder, training_records

logger = logging.getLogger(__name__)


def plot_run(folder: RunFolder) -> list[Path]:
    """Draw what the run folder holds into its `plots/`; return the files written. A picture that cannot be drawn is
    told of and left out: it says nothing about the run."""
    written = []
    for draw in (_losses, _positions):
        try:
            written += draw(folder)
        except Exception as error:
            logger.warning("a picture of %s was not drawn: %s: %s", folder, type(error).__name__, error)
    return written


def _losses(folder: RunFolder) -> list[Path]:
    steps = read_json_lines(folder.metrics)
    if not steps:
        return []
    figure, axes = new_figure("tokens", "loss (nats per token)")
    draw_losses(axes, {"run": (steps, training_records(read_json_lines(folder.evaluations)))})
    figure.savefig(folder.plots / "loss.png")
    return [folder.plots / "loss.png"]


def _positions(folder: RunFolder) -> list[Path]:
    evaluations = training_records(read_json_lines(folder.evaluations))
    if not evaluations:
        return []
    return [plot_positions({"validation": evaluations[-1]}, folder.plots / "loss_by_position.png")]
