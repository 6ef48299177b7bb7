"""The damage of a run folder: its checkpoints, its exports and its records, each by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moba_megatron.checkpoint import CheckpointError, Manifest, list_checkpoints
from moba_megatron.checkpoint.damage import damages
from moba_megatron.checkpoint.find import find_checkpoint
from moba_megatron.config import ConfigError, load_config
from moba_megatron.convert.export_digests import SOURCE, check_export
from moba_megatron.corpus.tokenizer import Tokenizer
from moba_megatron.runs.folder import RunFolder


@dataclass(frozen=True)
class Finding:
    """A part of a run folder, a short description, and its problems, one line each."""

    path: Path
    words: str
    problems: tuple[str, ...] = ()


def checkpoint_findings(path: Path, advance: Callable[[str], None] = lambda what: None) -> Iterator[Finding]:
    """Look at a checkpoint, at an export, or at all of both in a run folder.

    Raises:
        CheckpointError: it is something else.
    """
    if (path / SOURCE).is_file():
        yield _export(path)
        return
    run = RunFolder(path)
    numbered = sorted(run.checkpoints.glob("step_*")) if run.checkpoints.is_dir() else []
    # A folder that lost its manifest has the name of a complete one as well.
    folders = [folder for folder in numbered if folder.is_dir()]
    if not folders:
        find_checkpoint(path)
        folders = [path]
    for folder in sorted(folders, key=lambda folder: (len(folder.name), folder.name)):
        problems = tuple(damages(folder, advance))
        yield Finding(folder, _words(folder, problems), problems)
    if run.exports.is_dir():
        for folder in sorted(run.exports.glob("step_*")):
            advance(str(folder))
            yield _export(folder)


def run_findings(path: Path, advance: Callable[[str], None] = lambda what: None) -> Iterator[Finding]:
    """Look at all of a run folder that can be damaged.

    Raises:
        CheckpointError: it is not a run folder.
    """
    run = RunFolder(path)
    if not (run.config.is_file() or run.checkpoints.is_dir()):
        raise CheckpointError(f"{path} is not a run folder: it has neither config.yaml nor checkpoints/")
    yield _status(run)
    yield _config(run)
    for file in (run.metrics, run.evaluations, run.starts, run.divergences):
        if file.is_file():
            yield _lines(file, steps=file == run.metrics)
    if list_checkpoints(run.checkpoints):
        yield from checkpoint_findings(path, advance)
        yield _tokenizer(run)
    for left in sorted([*run.checkpoints.glob(".step_*"), *run.exports.glob(".step_*")]):
        yield Finding(left, "unfinished: a process is writing it or was killed; the next start removes it")


def _words(folder: Path, problems: tuple[str, ...]) -> str:
    try:
        manifest = Manifest.read(folder)
    except CheckpointError:
        return "no manifest that can be read"
    size = sum(entry["bytes"] for entry in manifest.files.values())
    return f"{manifest.consumed_samples:,} samples, {len(manifest.files)} files, {size / 1e6:,.1f} MB"


def _export(folder: Path) -> Finding:
    try:
        check_export(folder, whole=True)
    except (CheckpointError, OSError) as error:
        return Finding(folder, "export", (str(error),))
    held = "export" if (folder / SOURCE).is_file() else "a folder without digests: nothing to compare it with"
    return Finding(folder, held)


def _status(run: RunFolder) -> Finding:
    if not run.status.is_file():
        return Finding(run.status, "missing: no process has trained here")
    try:
        found = json.loads(run.status.read_text(encoding="utf-8"))
        words = f"{found['state']} at step {found['step']}"
        return Finding(run.status, f"{words}: {found['error']}" if "error" in found else words)
    except (ValueError, KeyError, TypeError) as error:
        return Finding(run.status, "", (f"cannot be read: {type(error).__name__}: {error}",))


def _config(run: RunFolder) -> Finding:
    if not run.config.is_file():
        return Finding(run.config, "not there")
    try:
        load_config(run.config)
    except (ConfigError, OSError) as error:
        text = "; ".join(error.problems) if isinstance(error, ConfigError) else str(error)
        return Finding(run.config, "", (text,))
    return Finding(run.config, "can be read")


def _lines(file: Path, *, steps: bool) -> Finding:
    """Lines of JSON, of which the last may be cut where a process was killed; with `steps`, one for each step."""
    problems: list[str] = []
    records: list[dict[str, Any]] = []
    *whole, rest = file.read_bytes().split(b"\n")
    for number, line in enumerate(whole, start=1):
        try:
            records.append({**json.loads(line)})
        except (ValueError, TypeError) as error:
            problems.append(f"line {number} cannot be read: {error}")
    words = f"{len(whole):,} lines" + (", the last one is cut: the next start fixes it" if rest else "")
    if steps and not problems:
        numbers = [record.get("step") for record in records]
        holes = [(a, b) for a, b in zip(numbers, numbers[1:], strict=False) if b != (a or 0) + 1]
        problems += [f"step {b} follows step {a}" for a, b in holes]
    return Finding(file, words, tuple(problems))


def _tokenizer(run: RunFolder) -> Finding:
    """The copy that a run keeps is the tokenizer of its newest checkpoint."""
    newest = list_checkpoints(run.checkpoints)[-1]
    try:
        wanted = Manifest.read(newest).data.get("tokenizer")
        found = Tokenizer(run.tokenizer).fingerprint
    except (CheckpointError, ValueError, OSError) as error:
        return Finding(run.tokenizer, f"cannot be compared: {error}")
    if found != wanted:
        return Finding(run.tokenizer, "", (f"has the fingerprint {found}, {newest.name} was trained with {wanted}",))
    return Finding(run.tokenizer, "that of the newest checkpoint")
