"""Pictures of a run: the loss over the tokens, and the last evaluation by position."""

from __future__ import annotations

from pathlib import Path

from moba_megatron.evaluation.losses.curves import draw_losses
from moba_megatron.evaluation.plots import new_figure, plot_positions
from moba_megatron.runs.files import read_json_lines
from moba_megatron.runs.folder import RunFolder, trained_steps, training_records


def plot_run(folder: RunFolder) -> list[Path]:
    """Draw the records of a run folder into its `plots/`; return the files written."""
    steps = trained_steps(read_json_lines(folder.metrics))
    evaluations = training_records(read_json_lines(folder.evaluations))
    written = []
    if steps:
        figure, axes = new_figure("tokens", "loss (nats per token)")
        draw_losses(axes, {"run": (steps, evaluations)})
        figure.savefig(folder.plots / "loss.png")
        written.append(folder.plots / "loss.png")
    if evaluations:
        written.append(plot_positions({"validation": evaluations[-1]}, folder.plots / "loss_by_position.png"))
    return written
