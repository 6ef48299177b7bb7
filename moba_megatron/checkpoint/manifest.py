"""The manifest of a checkpoint folder: `step_N/checkpoint.json`.

The manifest is the last file to appear in a checkpoint, and only then one rename gives the folder its name `step_N`. So
a folder with that name is complete, and what a killed run leaves behind is a hidden `.step_N.partial` that nobody
reads. The manifest records size and digest of every file; `verify` compares them with the disk. It also has a digest of
itself. Digests find damage. They are not a signature: whoever changes a file can also write new digests.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic wants this one below Python 3.12

from moba_megatron.config.inside import named_file

FORMAT = 1
NAME = "checkpoint.json"
# The manifest's digest of itself; manifests of earlier versions have none.
OWN_DIGEST = "blake2b"
# What a network disk keeps of files that are deleted while they are open.
_LEFT_BY_DISKS = ".nfs"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, with the reason and what to do."""


class NotFinite(CheckpointError):
    """Weights or optimizer state that hold infinities or NaN, with the names of the tensors.

    Attributes:
        step: of the training that they are the state after, where they are.
    """

    def __init__(self, words: str, step: int | None = None):
        super().__init__(words)
        self.step = step


class SaveError(CheckpointError):
    """A checkpoint that could not be written. Raised on all ranks alike; those before it are untouched."""


class FileRecord(TypedDict):
    """Size in bytes and BLAKE2b digest of a file."""

    bytes: int
    blake2b: str


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
    files: dict[str, FileRecord] = field(default_factory=dict)
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
        """Write `folder/checkpoint.json`, with a digest of its values."""
        # As they will be read: JSON knows no numbers as keys, and no tuples.
        values = json.loads(json.dumps(asdict(self)))
        text = json.dumps({**values, OWN_DIGEST: digest_values(values)}, indent=1)
        (folder / NAME).write_text(text, encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Raises CheckpointError if the folder is not a complete checkpoint, was written by a newer version, or has a
        manifest that is damaged, of another step or contradicts itself."""
        path = folder / NAME
        if not path.is_file():
            raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {NAME}")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path} is damaged: it holds no object")
        if values.get("format") != FORMAT:
            raise CheckpointError(f"{path} has format {values.get('format')}, this version reads format {FORMAT}")
        recorded = values.pop(OWN_DIGEST, None)
        if recorded is not None and recorded != digest_values(values):
            raise CheckpointError(
                f"{path} is damaged: it has changed since it was written (its digest does not fit). Take another "
                "checkpoint, or a copy of this one"
            )
        if unknown := sorted(values.keys() - {item.name for item in fields(Manifest)}):
            raise CheckpointError(f"{path} is damaged: it has unknown entries {', '.join(unknown)}")
        try:
            manifest = TypeAdapter(Manifest).validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"{path} is damaged: {place}: {first['msg']}") from error
        if problems := [*_contradictions(manifest), *_misplaced(manifest, folder)]:
            raise CheckpointError(f"{path} is damaged: {'; '.join(problems)}")
        return manifest


def _contradictions(manifest: Manifest) -> list[str]:
    """What a manifest's counts say against each other and against its configuration, one line each."""
    step, samples, tokens = manifest.step, manifest.consumed_samples, manifest.consumed_tokens
    try:
        length, steps = manifest.config["data"]["sequence_length"], manifest.config["training"]["steps"]
    except (KeyError, TypeError) as error:
        return [f"its configuration lacks {error}"]
    lines = []
    if type(length) is not int or type(steps) is not int:
        return [
            f"data.sequence_length = {length!r} and training.steps = {steps!r} of its configuration are not numbers"
        ]
    if not 0 <= step <= steps:
        lines.append(f"step = {step}, but the run has training.steps = {steps}")
    if samples < step or (samples > 0) != (step > 0):
        lines.append(f"consumed_samples = {samples} after step {step}")
    same_length = not any("data.sequence_length" in change.get("changed", {}) for change in manifest.data_changes)
    if tokens is not None and same_length and tokens != samples * length:
        lines.append(f"consumed_tokens = {tokens}, but {samples} samples of {length} tokens are {samples * length}")
    return lines


def _misplaced(manifest: Manifest, folder: Path) -> list[str]:
    """Whether the folder has the name of another step. A copy may have a name of its own."""
    return [
        f"it is the checkpoint of step {manifest.step}, but the folder is called {name}"
        for name in dict.fromkeys((folder.name, folder.resolve().name))
        if re.fullmatch(r"step_\d+", name) and name != f"step_{manifest.step}"
    ]


def digest_values(values: dict[str, Any]) -> str:
    """BLAKE2b digest of JSON values, whatever their order and layout in the file."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def digest_file(path: Path) -> FileRecord:
    """The record of a file as it is now."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16))
    return FileRecord(bytes=path.stat().st_size, blake2b=digest.hexdigest())


def verify(folder: Path, manifest: Manifest, part: int = 0, parts: int = 1) -> list[str]:
    """Compare every `parts`-th file, from number `part` on, with the manifest; one line for each difference.
    Part 0 also compares the list of files with the folder."""
    problems = unlisted(folder, manifest) if part == 0 else []
    for name in sorted(manifest.files)[part::parts]:
        problem = differs(folder / NAME, name, manifest.files[name])
        problems += [problem] if problem else []
    return problems


def differs(listed_in: Path, name: str, recorded: Mapping[str, Any], *, digest: bool = True) -> str | None:
    """How a file differs from its record `{"bytes": int, "blake2b": str}`, in a line; None if it does not.

    Args:
        listed_in: the file that holds the record, in the same folder.
        digest: read it as well.
    """
    try:
        path = named_file(listed_in, name)
    except ValueError as error:
        return str(error)
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != recorded.get("bytes"):
        return f"{name} has {path.stat().st_size} bytes, {recorded.get('bytes')} were written"
    return f"{name} has changed since it was written" if digest and digest_file(path) != recorded else None


def unlisted(folder: Path, manifest: Manifest) -> list[str]:
    """Files in a checkpoint folder that its manifest does not know, one line each."""
    found = {path.name for path in folder.iterdir() if not path.name.startswith(_LEFT_BY_DISKS)}
    return [f"{name} is not in {NAME}" for name in sorted(found - manifest.files.keys() - {NAME})]


def misplaced_files(folder: Path, manifest: Manifest) -> list[str]:
    """What names and sizes alone tell: files that are missing, surplus, of another size or outside the folder."""
    lines = [differs(folder / NAME, name, recorded, digest=False) for name, recorded in sorted(manifest.files.items())]
    return [*unlisted(folder, manifest), *filter(None, lines)]


def damaged(folder: Path, problems: list[str]) -> CheckpointError:
    """The error that names what is wrong with a checkpoint's files, and the ways on."""
    return CheckpointError(
        f"{folder} is damaged: {'; '.join(problems)}. Remove the folder to continue from the checkpoint before it, "
        "or go on from another one in another run.dir (checkpoint.resume=PATH)"
    )


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
