"""Pictures of a run: the loss over the tokens, and the last evaluation by position."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from moba_megatron.evaluation.plots import new_figure, plot_positions
from moba_megatron.training.metrics import read_json_lines
from moba_megatron.training.run_folder import RunFolder


def plot_run(folder: RunFolder) -> list[Path]:
    """Draw what the run folder holds into its `plots/`; return the files written."""
    steps, evaluations = read_json_lines(folder.metrics), read_json_lines(folder.evaluations)
    written = []
    if steps:
        written.append(_plot_loss(steps, evaluations, folder.plots / "loss.png"))
    if evaluations:
        written.append(
            plot_positions({"validation": evaluations[-1]["by_position"]}, folder.plots / "loss_by_position.png")
        )
    return written


def _plot_loss(steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], path: Path) -> Path:
    figure, axes = new_figure("tokens", "loss (nats per token)")
    tokens, losses = [s["tokens"] for s in steps], [s["loss"] for s in steps]
    width = max(1, len(steps) // 50)
    smooth = [statistics.fmean(losses[max(0, i - width + 1) : i + 1]) for i in range(len(losses))]
    axes.plot(tokens, losses, linewidth=0.5, alpha=0.4, color="tab:blue")
    axes.plot(tokens, smooth, linewidth=1.5, color="tab:blue", label=f"training (mean of {width} steps)")
    axes.plot([e["tokens"] for e in evaluations], [e["loss"] for e in evaluations], marker="o", label="validation")
    trailing = [(e["tokens"], e["trailing_loss"]) for e in evaluations if e["trailing_loss"] is not None]
    if trailing:
        axes.plot(
            *zip(*trailing, strict=True), marker="s", label=f"last {evaluations[-1]['trailing_tokens']} positions"
        )
    for before, after in zip(steps, steps[1:], strict=False):
        if before["stage"] != after["stage"]:
            axes.axvline(before["tokens"], color="grey", linestyle="--", linewidth=1)
            axes.annotate("attention stage", (before["tokens"], axes.get_ylim()[1]), rotation=90, va="top", ha="right")
    axes.legend()
    figure.savefig(path)
    return path
