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
from moba_megatron.runs.disk import name_file
from moba_megatron.runs.environment import write_environment
from moba_megatron.runs.files import readable_json_lines, write_whole
from moba_megatron.runs.folder import RunFolder
from moba_megatron.runs.starts import record_start
from moba_megatron.runs.trackers import Trackers


class JsonLines:
    """A file with one JSON object a line, each with a `step`.

    Attributes:
        damaged: lines that were no JSON when it was opened, as after the power failed; they are left out.
        kept: steps of the lines that were there and stay.
    """

    def __init__(self, path: Path, keep_steps: int):
        """Open for appending, after dropping every line of a step above `keep_steps`, and a line cut short by a
        kill. A line whose step is null, of weights without a known history, stays."""
        self.path = path
        lines, self.damaged = readable_json_lines(path)
        lines = [line for line in lines if (line["step"] or 0) <= keep_steps]
        self.kept = {line["step"] for line in lines}
        if path.is_file():
            write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
        self.stream = path.open("a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        """Add a line, which other processes see at once.

        Raises:
            OSError: the disk does not take it; the error names the file and the bytes of the line.
        """
        line = json.dumps(values) + "\n"
        try:
            self.stream.write(line)
            self.stream.flush()
        except OSError as error:
            name_file(error, self.path, len(line))
            raise

    def flush_to_disk(self) -> None:
        """Return when all lines survive a failure of the machine."""
        try:
            self.stream.flush()
            os.fsync(self.stream.fileno())
        except OSError as error:
            name_file(error, self.path, 0)
            raise

    def close(self) -> None:
        self.stream.close()


class MetricsWriter:
    """One rank's writer for training steps and evaluations.

    Attributes:
        gaps: what of the steps before has no line any more, in words; empty where nothing is missing.
    """

    def __init__(self, folder: RunFolder, config: Config, resumed_step: int):
        write_environment(folder)
        record_start(folder, config, resumed_step)
        self.folder, self.logging = folder, config.logging
        self.settings = config.model_dump(mode="json")
        self._open(resumed_step)
        starts, _ = readable_json_lines(folder.starts)
        self.gaps = _gaps(self.steps, starts[0]["step"] + 1, resumed_step)

    def step(self, values: dict[str, Any]) -> None:
        self.steps.write(values)
        self.trackers.track(values, "train", values["step"])

    def evaluation(self, values: dict[str, Any]) -> None:
        self.evaluations.write(values)
        self.trackers.track(values, "evaluation", values["step"])

    def flush_to_disk(self) -> None:
        """Return when all lines survive a failure of the machine: a checkpoint must not outlive them."""
        self.steps.flush_to_disk()
        self.evaluations.flush_to_disk()

    def go_back(self, step: int) -> None:
        """Forget everything after a step: it comes again."""
        self.close()
        self._open(step)

    def close(self) -> None:
        self.steps.close()
        self.evaluations.close()
        self.trackers.close()

    def _open(self, step: int) -> None:
        self.steps = JsonLines(self.folder.metrics, step)
        self.evaluations = JsonLines(self.folder.evaluations, step)
        self.trackers = Trackers(self.folder, self.logging, self.settings, purge_step=step + 1)


def _gaps(steps: JsonLines, first: int, last: int) -> list[str]:
    """Which steps from `first` to `last` have no line, in words."""
    missing = sorted(set(range(first, last + 1)) - steps.kept)
    lines = [f"{steps.path}: {steps.damaged} lines were damaged, and are left out"] if steps.damaged else []
    if missing:
        runs: list[list[int]] = []
        for step in missing:
            if runs and step == runs[-1][1] + 1:
                runs[-1][1] = step
            else:
                runs.append([step, step])
        words = ", ".join(f"{a}" if a == b else f"{a} to {b}" for a, b in runs)
        lines.append(
            f"{steps.path} lacks steps {words} of the {last} before: they were trained, and their numbers are lost"
        )
    return lines
