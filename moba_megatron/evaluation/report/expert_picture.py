"""How a mixture of experts shares its tokens out over a training: load and entropy of each layer, what goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FORM = {"load": "fullest expert's load / mean", "entropy": "entropy of the load / its largest"}


def recorded_steps(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps that recorded the load of experts."""
    return [step for step in steps if step.get("experts")]


def plot_experts(steps: list[dict[str, Any]], path: Path) -> Path:
    """Draw load and entropy of each layer over the tokens, and experts without tokens and dropped tokens of all layers.

    Args:
        steps: lines of `metrics.jsonl` with `experts` (`training.step_metrics.expert_metrics`), at least one.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), dpi=90, layout="constrained")
    *maps, lines = figure.subplots(1, 3)
    for axes, (key, title) in zip(maps, FORM.items(), strict=True):
        _draw_layers(figure, axes, steps, key)
        axes.set(title=title, xlabel="tokens", ylabel="layer")
    tokens = [step["tokens"] for step in steps]
    dead = [sum(layer["dead"] for layer in step["experts"]) for step in steps]
    dropped = [100 * sum(layer["dropped"] for layer in step["experts"]) / len(step["experts"]) for step in steps]
    lines.plot(tokens, dead, ".-", markersize=3, label="experts without a token, all layers")
    lines.plot(tokens, dropped, ".-", markersize=3, label="dropped tokens (%)")
    lines.set(xlabel="tokens", ylim=(0, None))
    lines.yaxis.get_major_locator().set_params(integer=True)
    lines.grid(alpha=0.3)
    lines.legend(fontsize=8)
    figure.savefig(path)
    return path


def _draw_layers(figure: Any, axes: Any, steps: list[dict[str, Any]], key: str) -> None:
    layers = [layer["layer"] for layer in steps[-1]["experts"]]
    rows = [[_of_layer(step, number)[key] for step in steps] for number in layers]
    first, last = steps[0]["tokens"], steps[-1]["tokens"]
    extent = (first, last if last > first else first + 1, len(layers), 0)
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", cmap="viridis", extent=extent)
    every = -(-len(layers) // 12)
    axes.set_yticks([number + 0.5 for number in range(0, len(layers), every)], layers[::every])
    figure.colorbar(image, ax=axes)


def _of_layer(step: dict[str, Any], number: int) -> dict[str, float]:
    return next((layer for layer in step["experts"] if layer["layer"] == number), {"load": 0.0, "entropy": 0.0})
