"""What a checkpoint folder says of itself: `step_N/checkpoint.json`.

The manifest is the last file to appear in a checkpoint and the folder gets its name `step_N` only after it, by one
rename. So a folder with that name is complete, and whatever a killed run left behind is a hidden `.step_N.partial` that
nobody reads. The manifest records size and digest of every file; `verify` holds them against the disk.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
NAME = "checkpoint.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with the reason and what to do."""


class SaveError(CheckpointError):
    """A checkpoint that could not be written. Raised on all ranks alike; those before it are untouched."""


@dataclass
class Manifest:
    """Facts about a checkpoint that are readable without torch.

    step counts finished optimizer steps, consumed_samples and consumed_tokens (None: samples x sequence length) what
    they took; `config` is the run's resolved configuration, `schedule` its attention schedule, `data` what identifies
    its tokenizer and training data, `data_changes` where data or packing changed between stages of the run (see
    `training.data_position`), `skipped_batches` the steps whose batch changes nothing (see `training.divergence`),
    `files` maps names to `{"bytes": int, "blake2b": str}`.
    """

    step: int
    consumed_samples: int
    config: dict[str, Any]
    schedule: dict[str, Any]
    data: dict[str, str]
    versions: dict[str, str]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    consumed_tokens: int | None = None
    data_changes: list[dict[str, Any]] = field(default_factory=list)
    skipped_batches: list[dict[str, Any]] = field(default_factory=list)
    format: int = FORMAT

    @property
    def tokens(self) -> int:
        """Tokens that training had read."""
        counted = self.consumed_tokens
        return self.consumed_samples * self.config["data"]["sequence_length"] if counted is None else counted

    def write(self, folder: Path) -> None:
        (folder / NAME).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Raises CheckpointError if the folder is no complete checkpoint or was written by a newer version."""
        path = folder / NAME
        if not path.is_file():
            raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {NAME}")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        if values.get("format") != FORMAT:
            raise CheckpointError(f"{path} has format {values.get('format')}, this version reads format {FORMAT}")
        try:
            return Manifest(**values)
        except TypeError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error


def digest_file(path: Path) -> dict[str, Any]:
    """Size in bytes and BLAKE2b digest of a file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16))
    return {"bytes": path.stat().st_size, "blake2b": digest.hexdigest()}


def verify(folder: Path, manifest: Manifest, part: int = 0, parts: int = 1) -> list[str]:
    """Hold every `parts`-th file, from number `part` on, against the manifest; one line for each that does not fit."""
    problems = []
    for name in sorted(manifest.files)[part::parts]:
        recorded, path = manifest.files[name], folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != recorded["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, {recorded['bytes']} were written")
        elif digest_file(path) != recorded:
            problems.append(f"{name} has changed since it was written")
    return problems


def list_checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints (`step_N`) in a folder, oldest first."""
    if not directory.is_dir():
        return []
    numbered = [
        (int(match[1]), path) for path in directory.iterdir() if (match := re.fullmatch(r"step_(\d+)", path.name))
    ]
    return [path for _, path in sorted(numbered) if (path / NAME).is_file()]


def find_latest(directory: Path) -> Path | None:
    """The newest complete checkpoint in a folder, or None."""
    return next(reversed(list_checkpoints(directory)), None)
