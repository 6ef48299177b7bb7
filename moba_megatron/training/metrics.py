"""Where the numbers of a run go: `metrics.jsonl` always, TensorBoard and Weights & Biases as the configuration says.

Only one rank writes. A resumed run first cuts its files back to the step it resumes from, so that no step appears
twice.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from moba_megatron.config import Config

# What TensorBoard and Weights & Biases take as the axis, not as a curve.
AXES = ("step", "stage")


class JsonLines:
    """A file with one JSON object a line, each with a `step`."""

    def __init__(self, path: Path, keep_steps: int):
        """Open for appending, after dropping every line of a step above `keep_steps`, and a line cut short by a
        kill."""
        self.path = path
        kept = [line for line in read_json_lines(path) if line["step"] <= keep_steps]
        if path.is_file():
            shorter = path.with_suffix(".tmp")
            shorter.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(shorter, path)
        self.stream = path.open("a")

    def write(self, values: dict[str, Any]) -> None:
        self.stream.write(json.dumps(values) + "\n")
        self.stream.flush()

    def close(self) -> None:
        self.stream.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file, oldest first; empty if there is no file."""
    if not path.is_file():
        return []
    text = path.read_text()
    complete = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in complete.splitlines()]


class MetricsWriter:
    """One rank's writer for training steps and evaluations."""

    def __init__(self, folder: Path, config: Config, resumed_step: int):
        self.steps = JsonLines(folder / "metrics.jsonl", resumed_step)
        self.evaluations = JsonLines(folder / "evaluations.jsonl", resumed_step)
        self.tensorboard = _open_tensorboard(folder, resumed_step) if config.logging.tensorboard else None
        self.wandb = _open_wandb(folder, config) if config.logging.wandb != "off" else None

    def step(self, values: dict[str, Any]) -> None:
        self.steps.write(values)
        self._track(values, "train")

    def evaluation(self, values: dict[str, Any]) -> None:
        self.evaluations.write(values)
        self._track(values, "evaluation")

    def _track(self, values: dict[str, Any], prefix: str) -> None:
        curves = {
            f"{prefix}/{name}": value
            for name, value in values.items()
            if isinstance(value, int | float) and name not in AXES
        }
        if self.tensorboard:
            for name, value in curves.items():
                self.tensorboard.add_scalar(name, value, values["step"])
        if self.wandb:
            self.wandb.log({**curves, "step": values["step"]})

    def close(self) -> None:
        self.steps.close()
        self.evaluations.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def _open_tensorboard(folder: Path, resumed_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)


def _open_wandb(folder: Path, config: Config) -> Any:
    import wandb

    identity = folder / "wandb_id"
    if not identity.is_file():
        identity.write_text(secrets.token_hex(4))
    run = wandb.init(
        project=config.logging.wandb_project,
        name=folder.name,
        id=identity.read_text(),
        resume="allow",
        dir=str(folder),
        mode=config.logging.wandb,
        config=config.model_dump(mode="json"),
    )
    run.define_metric("*", step_metric="step")
    return run
