"""What sources are made of: inputs, parts, documents, what could not be a document, and what ends a corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

MIB = 2**20


class CorpusError(ValueError):
    """The recipe, or the files that it names, must change. That makes another corpus, which has no use for the work
    done on this one."""


@dataclass(frozen=True)
class Input:
    """A file, or the rows of a dataset: what decides whether a source is still the same."""

    name: str
    size: int
    """Bytes on disk; 0 where it is not known (streams)."""
    stamp: str
    """Modification time in nanoseconds, or the fingerprint of a dataset."""


@dataclass(frozen=True)
class Part:
    """A piece of one source that one worker reads in one go."""

    source: int
    """Number of the source in the recipe."""
    names: tuple[str, ...]
    """Files, relative to the folder of a `files` source, else paths; empty for datasets."""
    start: int
    """First byte (JSONL), row group (Parquet), row or stream shard (datasets); 0 for files."""
    stop: int
    """One past the last."""
    size: int
    """Bytes, about."""


@dataclass(frozen=True)
class Document:
    text: str
    utf8: bytes
    """The text in UTF-8."""
    path: str | None
    """Of a file, relative to its source's folder; None for a row."""
    digest: bytes
    """Hash of the text, 16 bytes."""

    @property
    def split_hash(self) -> int:
        """64 bits that the split is decided by: of the path of a file, of the text of a row."""
        digest = self.digest if self.path is None else _hash(self.path.encode(errors="surrogateescape"))
        return int.from_bytes(digest[:8], "big")


@dataclass(frozen=True)
class Skipped:
    name: str
    """File, and line, byte or row in it."""
    reason: str


def make_document(value: Any, name: str, path: str | None = None) -> Document | Skipped:
    """`value` is the text or its UTF-8 bytes."""
    if not isinstance(value, str | bytes):
        return Skipped(name, f"text is {type(value).__name__}, not a string")
    try:
        text = value.decode() if isinstance(value, bytes) else value
        utf8 = value if isinstance(value, bytes) else value.encode()
    except UnicodeError as error:
        return Skipped(name, f"not UTF-8: {error.reason} at {error.start}")
    return Document(text, utf8, path, _hash(utf8))


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def missing_column(where: str, source: Any, columns: Iterable[str]) -> str:
    """Text of the error for rows at `where` that lack the text column of `source`."""
    known = ", ".join(sorted(columns)) or "none"
    return f"{where}: no column {source.text_column!r} (there are: {known}); set text_column"
