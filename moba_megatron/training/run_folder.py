"""The run folder: what a run leaves on disk, and whether a run may continue in it.

RUN/config.yaml          the resolved configuration; one that a later start changed is kept as config.until_step_N.yaml
RUN/metrics.jsonl        one line a step
RUN/evaluations.jsonl    one line an evaluation
RUN/checkpoints/step_N/  see the checkpoint package
RUN/status.json          how the last process ended, for launchers that cannot trust exit codes
RUN/lock                 held by the process that trains here
RUN/plots/, RUN/tensorboard/, RUN/wandb/, RUN/profile/
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError

from moba_megatron.checkpoint import CheckpointError, find_latest
from moba_megatron.checkpoint.manifest import NAME, Manifest
from moba_megatron.config import Config, ConfigError
from moba_megatron.evaluation.records import training_records
from moba_megatron.model.schedule import AttentionSchedule
from moba_megatron.platform.files import Held, hold, read_json_lines, write_whole

State = Literal["running", "paused", "stopped", "finished", "failed"]

# What may differ between the processes of one run: where it writes, what it shows, how the work is spread.
FREE = (
    "run.dir",
    "run.threads",
    "attention.backend",
    "attention.full_backend",
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


LOCK = "lock"


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

    def evaluated(self, step: int) -> bool:
        """Whether training has evaluated itself after this step."""
        lines = read_json_lines(self.evaluations)
        return any(line["step"] == step for line in training_records(lines))

    def write_config(self, config: Config, resumed_step: int, choices: list[str]) -> None:
        """Write the resolved configuration, headed by what every `auto` became; keep a different previous one under
        another name."""
        self.plots.mkdir(parents=True, exist_ok=True)
        text = "".join(f"# {line}\n" for line in choices) + config.to_yaml()
        before = self.path / f"config.until_step_{resumed_step}.yaml"
        # Where there is one, the configuration since has left no step that is still there.
        if self.config.is_file() and self.config.read_text() != text and not before.exists():
            self.config.rename(before)
        write_whole(self.config, text)

    def write_status(self, state: State, step: int | None, **more: Any) -> None:
        """Say how the run stands: `state`, `step` (None: the last one on record), and whatever explains it."""
        if step is None:
            steps = read_json_lines(self.metrics)
            step = steps[-1]["step"] if steps else 0
        write_whole(self.status, json.dumps({"state": state, "step": step, **more}) + "\n")


class RunFolderInUse(ConfigError):
    """Another process trains in the run folder."""


@contextmanager
def claimed(path: str | Path) -> Iterator[str]:
    """Make a run folder this process's own meanwhile, see `hold`.

    Raises:
        RunFolderInUse: another process has claimed it.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    try:
        with hold(path / LOCK) as claim:
            yield claim
    except Held as held:
        raise RunFolderInUse([
            f"run.dir = {path} is being trained by {held.holder}: wait for it, stop it, or give run.dir another name"
        ]) from held  # fmt: skip


def check_shared(path: str | Path, claim: str | None, patience: float = 60.0) -> None:
    """Raise on all ranks if some of them do not see the run folder that rank 0 has claimed. Collective.

    Args:
        claim: on rank 0, what `claimed` yields.
        patience: seconds for which a network disk may lag.

    Raises:
        ConfigError: naming the machines.
    """
    lock, deadline = Path(path) / LOCK, time.monotonic() + patience
    words = [claim]
    torch.distributed.broadcast_object_list(words, src=0)

    def seen() -> bool:
        # Rank 0 would give up its claim by reading it.
        return claim is not None or (lock.is_file() and lock.read_text().strip() == words[0])

    while not seen() and time.monotonic() < deadline:
        time.sleep(1)
    blind: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(blind, "" if seen() else socket.gethostname())
    machines = ", ".join(sorted(set(blind) - {""}))
    if machines:
        raise ConfigError([
            f"run.dir = {path} (claimed by {words[0]}) is not seen on {machines}: give run.dir a folder on a "
            "disk that all machines share"
        ])  # fmt: skip


def find_resume(config: Config, schedule: AttentionSchedule, data: dict[str, str]) -> Path | None:
    """The checkpoint that this run continues from, or None for a new run.

    Args:
        data: what identifies tokenizer and training data, as a checkpoint's manifest records it.

    Raises:
        ConfigError: the run folder or the named checkpoint cannot be used, with every difference in the way.
    """
    folder, resume = RunFolder(config.run.dir), config.checkpoint.resume
    own = find_latest(folder.checkpoints)
    if resume == "never":
        if own or folder.metrics.is_file():
            raise ConfigError([
                f"checkpoint.resume = never, but {folder.path} already holds a run: choose another run.dir, "
                "or continue it with checkpoint.resume=auto"
            ])  # fmt: skip
        return None
    chosen = own if resume == "auto" else _named_checkpoint(Path(resume), own)
    if chosen is not None:
        try:
            problems = differences(Manifest.read(chosen), config, schedule, data)
        except CheckpointError as error:
            raise ConfigError([str(error)]) from error
        if problems:
            raise ConfigError([f"{chosen} belongs to a run with other settings", *problems])
    return chosen


def _named_checkpoint(named: Path, own: Path | None) -> Path:
    """A named checkpoint starts a run; once the run has checkpoints of its own, it continues from the newest of
    these."""
    if not (named / NAME).is_file():
        raise ConfigError(
            [f"checkpoint.resume = {named}: no complete checkpoint there (auto, never, or a step_N folder)"]
        )
    if own is not None and named.resolve() != own.resolve() and named.resolve().parent == own.resolve().parent:
        raise ConfigError(
            [f"checkpoint.resume = {named}: the run already has {own.name}; to go back, choose another run.dir"]
        )
    return named if own is None else own


def differences(manifest: Manifest, config: Config, schedule: AttentionSchedule, data: dict[str, str]) -> list[str]:
    """What of a checkpoint's run differs and may not: one line each, with both values and the way to allow it."""
    allowed = (*FREE, *config.checkpoint.allow_changed)

    def free(key: str) -> bool:
        return any(key == name or key.startswith(name + ".") for name in allowed)

    before, now = _flatten(_with_defaults(manifest.config)), _flatten(config.model_dump(mode="json"))
    changed = [
        (key, f"{key} = {now.get(key)!r}, but the run has {before.get(key)!r}")
        for key in sorted(before.keys() | now.keys())
        # Schedules are compared by what they mean.
        if before.get(key) != now.get(key) and not key.startswith("attention.")
    ]
    for line in schedule.differences(AttentionSchedule.from_dict(manifest.schedule)):
        changed.append(("attention", f"attention: {line} in the run's schedule"))
    for name, key in (("tokenizer", "data.tokenizer"), ("train", "data.train")):
        if manifest.data.get(name) != data.get(name):
            line = f"{key}: the files are not those that the run was trained on, or not in the same shares"
            changed.append((key, line))
    problems = [
        f'{line}: set it back, or allow it by checkpoint.allow_changed=["{key}"]'
        for key, line in changed
        if not free(key)
    ]
    key = "attention.key_convolution"
    if before.get(key) != now.get(key):
        problems.append(f"{key} = {now.get(key)}, but the run has {before.get(key)}: it is parameters; set it back")
    return problems


def _with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's configuration with settings that are younger than it at their defaults; as it is where it cannot
    be read today."""
    try:
        return Config.model_validate(values).model_dump(mode="json")
    except ValidationError:
        return values


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {k: v for name, part in tree.items() for k, v in _flatten(part, f"{prefix}.{name}".strip(".")).items()}
    return {prefix: tree}
