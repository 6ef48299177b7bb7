"""What sources are made of: inputs, parts, documents, what could not be a document, and what ends a corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

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
    """First byte (JSONL), row group (Parquet), record batch (Arrow), row or stream shard (datasets); 0 for files."""
    stop: int
    """One past the last."""
    size: int
    """Bytes, about."""


Kind = Literal["text", "prompt", "chat"]
Segment = tuple[str, bool]
"""A piece of a document's text, and whether its tokens are targets that count in the loss."""


@dataclass(frozen=True, slots=True)
class Document:
    number: int
    """Place in its part: see `sources.place_name`."""
    segments: tuple[Segment, ...]
    """The text, in order; it is encoded as a whole. A token belongs to the segment of its first character."""
    bytes: int
    """UTF-8 size of the text."""
    path: str | None
    """Of a file, relative to its source's folder; None for a row."""
    digest: bytes
    """Hash of the text, 16 bytes."""
    kind: Kind = "text"
    """`text`: all of it counts. `prompt`: a prompt and its answer. `chat`: written by a chat template, so that special
    tokens in it are the template's own."""
    row_digest: bytes | None = None
    """Where one row gives several documents: hash of what they have in common, so that none of them can be in another
    split than the others."""
    notes: tuple[str, ...] = ()
    """Counts of kept documents for the manifest."""

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.segments)

    @property
    def prompt(self) -> str:
        """The tokens before the first target."""
        return "".join(text for text, _ in takewhile(lambda segment: not segment[1], self.segments))

    @property
    def characters(self) -> int:
        return sum(len(text) for text, _ in self.segments)

    @property
    def split_hash(self) -> int:
        """64 bits that the split is decided by: of the path of a file, of the text of a row."""
        digest = self.row_digest or self.digest
        if self.path is not None:
            digest = text_hash(self.path.encode(errors="surrogateescape"))
        return int.from_bytes(digest[:8], "big")


@dataclass(frozen=True, slots=True)
class Skipped:
    """An input that could not become a document."""

    number: int
    """As in `Document`."""
    reason: str


@dataclass(frozen=True, slots=True)
class Incomplete(Skipped):
    """A row without some of the columns that are read. If no row of its source has them, the recipe is wrong."""

    present: tuple[str, ...]
    """The columns that it has."""


@dataclass(frozen=True, slots=True)
class Filtered:
    """A row that the recipe's boolean filter leaves out."""

    number: int


Item = Document | Skipped | Filtered


def make_document(value: Any, number: int, path: str | None = None) -> Document | Skipped:
    """A document all of whose tokens count. `value` is the text or its UTF-8 bytes."""
    if not isinstance(value, str | bytes):
        return Skipped(number, f"text is {type(value).__name__}, not a string")
    try:
        text = value.decode() if isinstance(value, bytes) else value
        utf8 = value if isinstance(value, bytes) else value.encode()
    except UnicodeError as error:
        return Skipped(number, f"not UTF-8: {error.reason} at {error.start}")
    if not utf8:
        return Skipped(number, "empty")
    return Document(number, ((text, True),), len(utf8), path, text_hash(utf8))


def make_segmented(
    segments: Sequence[Segment],
    number: int,
    *,
    kind: Kind = "prompt",
    row_digest: bytes | None = None,
    notes: tuple[str, ...] = (),
) -> Document | Skipped:
    """A document with some segments that are targets and others that are not. Empty segments vanish. The rest is as in
    `Document`."""
    try:
        pieces = [text.encode() for text, _ in segments]
    except UnicodeError as error:
        return Skipped(number, f"not UTF-8: {error.reason} at {error.start}")
    if not any(text for text, counts in segments if counts):
        return Skipped(number, "no text to learn: the answer is empty")
    kept = tuple((text, counts) for text, counts in segments if text)
    digest = text_hash(b"\0".join(pieces))
    return Document(number, kept, sum(map(len, pieces)), None, digest, kind, row_digest, notes)


def text_hash(data: bytes) -> bytes:
    """The hash of documents, 16 bytes."""
    return hashlib.blake2b(data, digest_size=16).digest()


@contextmanager
def whole_file(path: str, *errors: type[Exception]) -> Iterator[None]:
    """Turn an error of a library about a damaged file into an error of the corpus; one of the system has a number and
    stays.

    Args:
        errors: of the library, beside OSError.
    """
    try:
        yield
    except (OSError, *errors) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise CorpusError(f"{path} cannot be read to its end ({error}): fetch it again or remove it") from error
