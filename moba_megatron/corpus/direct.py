"""Recipes from the flags of the command line: `prepare --input PATH --tokenizer DIR`."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from moba_megatron.corpus.files import COMPRESSED, find_files, is_part, kind_by_name, no_match, split_pattern
from moba_megatron.corpus.jsonl import head_of

_TEXT = (".txt", ".text", ".md", ".rst")
_SHOWN = 5
_HEAD = 4096
_TABLES = (".csv", ".tsv", ".xls", ".xlsx", ".ods")
_PACKED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ", b"PK\x03\x04")
_HOW = "name its kind by a recipe or `--kind jsonl`, or give it another ending"


def direct_sources(
    inputs: list[str], dataset: str | None, dataset_split: str, text_column: str | None, kind: str | None = None
) -> tuple[list[dict[str, Any]], list[str]]:
    """(sources of a recipe, what is to be said of them) from the flags of the command line.

    Args:
        kind: of all inputs. None: each is looked at.

    Raises:
        ValueError: nothing there, files of a kind that is not known, or of several kinds.
    """
    sources: list[dict[str, Any]] = []
    lines = []
    column = {} if text_column is None else {"text_column": text_column}
    for path in map(os.path.expanduser, inputs):
        own, pattern = kind, None
        if own is None:
            own, pattern, left_out = _kind_of(path)
            lines += left_out
        elif own == "files" and os.path.isdir(path):
            pattern = "**/*"
        if own == "files":
            sources.append({"kind": "files", **_folder_and_pattern(path, pattern)})
        else:
            sources.append({"kind": own, "path": path, **column})
    if dataset:
        sources.append({"kind": "datasets", "path": dataset, "dataset_split": dataset_split, **column})
    return sources, lines


def direct_tokenizer(folder: Path | None, entries: int | None) -> dict[str, Any]:
    """Tokenizer of a recipe from the flags of the command line.

    Raises:
        ValueError: both or neither given.
    """
    if (folder is None) == (entries is None):
        raise ValueError("give either --tokenizer DIR or --train-tokenizer ENTRIES")
    return {"kind": "bpe", "vocab_size": entries} if folder is None else {"kind": "pretrained", "path": str(folder)}


def _kind_of(path: str) -> tuple[str, str | None, list[str]]:
    """(kind of the files that a path means, pattern for a folder of texts, what of it is left out)."""
    names = find_files(path).names
    if not names:
        raise ValueError(no_match(path))
    folder = os.path.isdir(path)
    kinds: dict[str, list[str]] = defaultdict(list)
    other: list[str] = []
    for name in names:
        if folder and not name.lower().endswith(".txt") and kind_by_name(name) is None and not is_part(name):
            # Of a folder only what is known is read.
            other.append(name)
        elif os.path.getsize(name):
            kinds["files" if name.lower().endswith(_TEXT) else kind_of_file(name)].append(name)
    if not kinds and len(other) == len(names):
        raise ValueError(f"{path} has no file of a known ending, only {_endings(other)}: give a pattern, or --kind")
    if not kinds:
        raise ValueError(f"no documents: all files of {path} are empty")
    if len(kinds) > 1:
        found = ", ".join(f"{len(own)} of kind {kind} ({own[0]})" for kind, own in sorted(kinds.items()))
        raise ValueError(
            f"{path} holds files of several kinds: {found}: give one --input for each, or --kind to read all of them "
            f"as one kind"
        )
    ((kind, own),) = kinds.items()
    lines = [f"{path}: {len(other):,} of {len(names):,} files are left out ({_endings(other)})"] if other else []
    if kind != "files" or not folder or all(name.endswith(".txt") for name in own):
        return kind, None, lines
    parts = all(is_part(name) for name in own)
    return kind, "**/part-*" if parts else "**/*.[tT][xX][tT]", lines


def _endings(names: list[str]) -> str:
    counts = Counter(os.path.splitext(name)[1] or os.path.basename(name) for name in names)
    shown = ", ".join(f"{ending} {count}" for ending, count in counts.most_common(_SHOWN))
    return f"{shown}, ..." if len(counts) > _SHOWN else shown


def _folder_and_pattern(path: str, pattern: str | None) -> dict[str, str]:
    if os.path.isdir(path):
        return {"path": path, **({"pattern": pattern} if pattern else {})}
    if os.path.isfile(path):
        return {"path": os.path.dirname(path) or ".", "pattern": os.path.basename(path)}
    folder, pattern = split_pattern(path)
    return {"path": folder, "pattern": pattern}


def kind_of_file(path: str) -> str:
    """The kind of source that reads a file: by its name, else by how it begins.

    Raises:
        ValueError: it is a table of a kind that is not read, a compressed file of unknown content, or no text.
    """
    kind = kind_by_name(path)
    if kind is not None:
        return kind
    name = os.path.basename(path)
    lower = name.lower()
    if lower.endswith(_TABLES) or lower.endswith(tuple(f"{t}{c}" for t in _TABLES for c in COMPRESSED)):
        raise ValueError(
            f'{path}: this kind of table is not supported. Convert it to Parquet: python -c "import pandas; '
            f"pandas.read_csv('{name}').to_parquet('{os.path.splitext(name)[0]}.parquet')\""
        )
    head = head_of(path, _HEAD)
    if head.startswith((b"PAR1", b"ARROW1")):
        return "parquet" if head.startswith(b"PAR1") else "arrow"
    if looks_like_rows(head):
        if is_part(name):
            return "jsonl"
        raise ValueError(f"{path} looks like JSON, but its ending is not known: {_HOW}")
    if lower.endswith(COMPRESSED) or head.startswith(_PACKED):
        raise ValueError(f"{path} is compressed; only JSON Lines may be: unpack it, or {_HOW}")
    return "files"


def looks_like_rows(head: bytes) -> bool:
    """Whether a file that begins so holds JSON: an object or a list, with a text or another value in it.

    >>> looks_like_rows(b'{"text": "a"}'), looks_like_rows(b"[1] A footnote."), looks_like_rows(b"{ in C }")
    (True, False, False)
    """
    text = head.decode("utf-8-sig", errors="replace").lstrip()
    if text.startswith("["):
        text = text[1:].lstrip()
    return text.startswith("{") and text[1:].lstrip()[:1] in ('"', "}")
