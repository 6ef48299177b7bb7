"""The run folder: what a run leaves on disk. Who reads or writes one of its files takes the path from here.

RUN/config.yaml          the resolved configuration; one that a later start changed is kept as config.until_step_N.yaml
RUN/origin.json          base model and license of the first weights, where they are known
RUN/tokenizer/           a copy of the tokenizer that it trains with
RUN/environment.json     versions, hardware, and the working directory of the last start
RUN/starts.jsonl         one line a start: its layout
RUN/metrics.jsonl        one line a step
RUN/evaluations.jsonl    one line an evaluation
RUN/divergences.jsonl    one line a step that was not finite or spiked, and what was done
RUN/replay/step_N.json   what a step that was run again showed
RUN/evaluation/*.json    the whole results of `moba-megatron evaluate`
RUN/checkpoints/step_N/  see the checkpoint package
RUN/exports/step_N/      Hugging Face folders that evaluations needed
RUN/status.json          how the last process ended, for launchers that cannot trust exit codes
RUN/lock                 held by the process that trains here
RUN/plots/, RUN/tensorboard/, RUN/wandb/, RUN/wandb_id, RUN/profile/
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from moba_megatron.config import Config
from moba_megatron.runs.files import readable_json_lines, write_in_place, write_whole

State = Literal["running", "paused", "stopped", "finished", "failed"]


class RunFolder:
    """Paths inside a run folder, whether they are there or not."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.origin = self.path / "origin.json"
        self.tokenizer = self.path / "tokenizer"
        self.environment = self.path / "environment.json"
        self.starts = self.path / "starts.jsonl"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluations = self.path / "evaluations.jsonl"
        self.divergences = self.path / "divergences.jsonl"
        self.replay = self.path / "replay"
        self.evaluation = self.path / "evaluation"
        self.checkpoints = self.path / "checkpoints"
        self.exports = self.path / "exports"
        self.plots = self.path / "plots"
        self.profile = self.path / "profile"
        self.tensorboard = self.path / "tensorboard"
        self.wandb_id = self.path / "wandb_id"
        self.status = self.path / "status.json"
        self.lock = self.path / "lock"

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def of(cls, checkpoint: Path) -> RunFolder:
        """The run folder of a checkpoint, wherever it was moved; the folder beside it if it stands alone."""
        parent = checkpoint.parent
        return cls(parent.parent if parent.name == "checkpoints" else parent)

    def evaluated(self, step: int) -> bool:
        """Whether training has evaluated itself after this step."""
        lines, _ = readable_json_lines(self.evaluations)
        return any(line["step"] == step for line in training_records(lines))

    def write_config(self, config: Config, resumed_step: int, choices: list[str]) -> None:
        """Write the resolved configuration, headed by what every `auto` became; keep a different previous one under
        another name."""
        self.plots.mkdir(parents=True, exist_ok=True)
        text = "".join(f"# {line}\n" for line in choices) + config.to_yaml()
        before = self.path / f"config.until_step_{resumed_step}.yaml"
        # A copy for this step exists; no later step survived.
        if self.config.is_file() and self.config.read_text(encoding="utf-8") != text and not before.exists():
            self.config.rename(before)
        write_whole(self.config, text)

    def write_status(self, state: State, step: int | None, **more: Any) -> None:
        """Say how the run stands: `state`, `step` (None: the last one on record), and whatever explains it."""
        if step is None:
            steps, _ = readable_json_lines(self.metrics)
            step = steps[-1]["step"] if steps else 0
        text = json.dumps({"state": state, "step": step, **more}) + "\n"
        try:
            write_whole(self.status, text)
        except OSError:
            if not self.status.is_file():
                raise
            write_in_place(self.status, text)


def training_records(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of `evaluations.jsonl` that training itself wrote."""
    return [line for line in lines if "kind" not in line]


def trained_steps(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` whose batch was trained on: all but those of skipped batches, which have no loss."""
    return [line for line in lines if "skipped" not in line]
