"""The pictures of a report, as data URLs: PNG bytes inside the page."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from moba_megatron.evaluation.losses.curves import draw_curve, draw_losses
from moba_megatron.evaluation.plots import plain, plot_positions
from moba_megatron.evaluation.report.expert_picture import plot_experts, recorded_steps
from moba_megatron.evaluation.report.run_view import RunView
from moba_megatron.evaluation.routing.plots import plot_layer
from moba_megatron.evaluation.routing.routing_report import routed

CURVES = {"lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens per second"}


def curves_picture(views: list[RunView]) -> str | None:
    """Losses, learning rate, gradient norm and speed over the tokens; None before the first step."""
    from matplotlib.figure import Figure

    runs = {plain(view.name): (view.thinned_steps(), view.validation) for view in views}
    if not any(steps for steps, _ in runs.values()):
        return None
    figure = Figure(figsize=(12, 7.5), dpi=100, layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    draw_losses(axes[0], runs)
    axes[0].set(xlabel="tokens", ylabel="loss (nats per token)")
    for place, (key, label) in enumerate(CURVES.items(), start=1):
        draw_curve(axes[place], runs, key)
        axes[place].set(xlabel="tokens", ylabel=label)
    axes[2].set_yscale("log")
    for some in axes:
        some.grid(alpha=0.3)
    return _picture(figure.savefig)


def positions_picture(views: list[RunView]) -> str | None:
    """Loss by position under each attention, as last evaluated after training, else in training; None without
    either."""
    results: dict[str, dict[str, Any]] = {}
    for view in views:
        prefix = f"{plain(view.name)}: " if len(views) > 1 else ""
        lines = view.latest("losses")
        for line in lines:
            results[f"{prefix}{line['attention']}"] = line
        if not lines and view.validation:
            results[f"{prefix}validation"] = view.validation[-1]
    return _picture(lambda file: plot_positions(results, file)) if results else None


def experts_picture(view: RunView) -> str | None:
    """The load of the experts of a run over its tokens; None for a dense model, and before the first step."""
    steps = recorded_steps(view.thinned_steps())
    return _picture(lambda file: plot_experts(steps, file)) if steps else None


def routing_pictures(layers: list[dict[str, Any]]) -> list[str]:
    """A picture for each layer's record that has choices."""
    return [_picture(lambda file, layer=layer: plot_layer(layer, file)) for layer in routed(layers)]


def pictures_of(folder: Path, pattern: str) -> list[str]:
    """Pictures that an evaluation has left in a folder."""
    return [_data_url(path.read_bytes()) for path in sorted(folder.glob(pattern))]


def _picture(draw: Callable[[BytesIO], Any]) -> str:
    file = BytesIO()
    draw(file)
    return _data_url(file.getvalue())


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode()}"
