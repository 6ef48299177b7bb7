"""The run folder: what a run leaves on disk, and whether a run may continue in it.

RUN/config.yaml          the resolved configuration; one that a later start changed is kept as config.until_step_N.yaml
RUN/metrics.jsonl        one line a step
RUN/evaluations.jsonl    one line an evaluation
RUN/checkpoints/step_N/  see the checkpoint package
RUN/status.json          how the last process ended, for launchers that cannot trust exit codes
RUN/plots/, RUN/tensorboard/, RUN/wandb/, RUN/profile/
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

from moba_megatron.checkpoint import find_latest
from moba_megatron.checkpoint.manifest import NAME, Manifest
from moba_megatron.config import Config, ConfigError

State = Literal["running", "paused", "stopped", "finished", "failed"]

# What may differ between the processes of one run: where it writes, what it shows, how the work is spread.
FREE = (
    "run.dir",
    "run.threads",
    "attention.backend",
    "parallel",
    "training.stop_after",
    "training.micro_batch_size",
    "training.recompute",
    "training.loss_chunk_size",
    "checkpoint",
    "evaluation",
    "logging",
    "data.validation",
)


class RunFolder:
    """Paths inside a run folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluations = self.path / "evaluations.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.plots = self.path / "plots"
        self.profile = self.path / "profile"
        self.status = self.path / "status.json"

    def write_config(self, config: Config, resumed_step: int, choices: list[str]) -> None:
        """Write the resolved configuration, headed by what every `auto` became; keep a different previous one under
        another name."""
        self.plots.mkdir(parents=True, exist_ok=True)
        text = "".join(f"# {line}\n" for line in choices) + config.to_yaml()
        if self.config.is_file() and self.config.read_text() != text:
            self.config.rename(self.path / f"config.until_step_{resumed_step}.yaml")
        _write_whole(self.config, text)

    def write_status(self, state: State, step: int | None, **more: Any) -> None:
        """Say how the run stands: `state`, `step`, and whatever explains it."""
        _write_whole(self.status, json.dumps({"state": state, "step": step, **more}) + "\n")


def find_resume(config: Config) -> Path | None:
    """The checkpoint that this run continues from, or None for a new run.

    Raises:
        ConfigError: the run folder or the named checkpoint cannot be used, with every difference in the way.
    """
    folder, resume = RunFolder(config.run.dir), config.checkpoint.resume
    latest = find_latest(folder.checkpoints)
    if resume == "never":
        if latest or folder.metrics.is_file():
            raise ConfigError([
                f"checkpoint.resume = never, but {folder.path} already holds a run: choose another run.dir, "
                "or continue it with checkpoint.resume=auto"
            ])  # fmt: skip
        return None
    if resume != "auto":
        latest = Path(resume)
        if not (latest / NAME).is_file():
            raise ConfigError(
                [f"checkpoint.resume = {resume}: no complete checkpoint there (auto, never, or a step_N folder)"]
            )
    if latest is not None:
        problems = differences(Manifest.read(latest).config, config)
        if problems:
            raise ConfigError([f"{latest} belongs to a run with other settings", *problems])
    return latest


def differences(saved: dict[str, Any], config: Config) -> list[str]:
    """What of a saved configuration differs and may not: one line each, with both values and the way to allow it."""
    allowed = (*FREE, *config.checkpoint.allow_changed)
    before, now = _flatten(saved), _flatten(config.model_dump(mode="json"))
    lines = []
    for key in sorted(before.keys() | now.keys()):
        free = any(key == name or key.startswith(name + ".") for name in allowed)
        if before.get(key) != now.get(key) and not free:
            allow = f'checkpoint.allow_changed=["{key.split(".stages")[0]}"]'
            lines.append(
                f"{key} = {now.get(key)!r}, but the run has {before.get(key)!r}: set it back, or allow it by {allow}"
            )
    return lines


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {k: v for name, part in tree.items() for k, v in _flatten(part, f"{prefix}.{name}".strip(".")).items()}
    return {prefix: tree}


def _write_whole(path: Path, text: str) -> None:
    """Replace a file so that a reader sees the old text or the new one."""
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)
