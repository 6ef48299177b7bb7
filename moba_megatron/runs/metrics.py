"""Where the numbers of a run go: `metrics.jsonl` always, TensorBoard and Weights & Biases as the configuration says.

Only one rank writes. A resumed run first cuts its files back to the step it resumes from, so that no step appears
twice.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from moba_megatron.config import Config
from moba_megatron.runs.environment import write_environment
from moba_megatron.runs.files import read_json_lines
from moba_megatron.runs.folder import RunFolder
from moba_megatron.runs.starts import record_start
from moba_megatron.runs.trackers import Trackers


class JsonLines:
    """A file with one JSON object a line, each with a `step`."""

    def __init__(self, path: Path, keep_steps: int):
        """Open for appending, after dropping every line of a step above `keep_steps`, and a line cut short by a
        kill. A line whose step is null, of weights without a known history, stays."""
        self.path = path
        kept = [line for line in read_json_lines(path) if (line["step"] or 0) <= keep_steps]
        if path.is_file():
            shorter = path.with_suffix(".tmp")
            shorter.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            os.replace(shorter, path)
        self.stream = path.open("a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        self.stream.write(json.dumps(values) + "\n")
        self.stream.flush()

    def close(self) -> None:
        self.stream.close()


class MetricsWriter:
    """One rank's writer for training steps and evaluations."""

    def __init__(self, folder: RunFolder, config: Config, resumed_step: int):
        write_environment(folder)
        record_start(folder, config, resumed_step)
        self.steps = JsonLines(folder.metrics, resumed_step)
        self.evaluations = JsonLines(folder.evaluations, resumed_step)
        settings = config.model_dump(mode="json")
        self.trackers = Trackers(folder, config.logging, settings, purge_step=resumed_step + 1)

    def step(self, values: dict[str, Any]) -> None:
        self.steps.write(values)
        self.trackers.track(values, "train", values["step"])

    def evaluation(self, values: dict[str, Any]) -> None:
        self.evaluations.write(values)
        self.trackers.track(values, "evaluation", values["step"])

    def close(self) -> None:
        self.steps.close()
        self.evaluations.close()
        self.trackers.close()
