"""megatron-core's indexed format, written in pieces of bounded size.

`PREFIX.bin` holds all token ids one after the other, uint16 or int32. `PREFIX.idx` holds: the magic `MMIDIDX\\0\\0`,
version 1 (uint64), a code for the dtype (uint8: 4 is int32, 8 is uint16), the number of sequences and one more than the
number of documents (uint64 each), the length of each sequence in tokens (int32), the byte offset of each in the .bin
(int64), and the first sequence of each document with the total at the end (int64). Here a document is one sequence that
ends in the end-of-document id.

A *view* has its own index, and its `.bin` is a symbolic link to another dataset's: some of its documents, in place.
megatron-core reads it like any dataset.

The bytes equal those of megatron-core's own `IndexedDatasetBuilder` fed document by document, without importing it:
workers start in a fraction of a second.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

LENGTH = np.dtype("<i4")
_OFFSET = np.dtype("<i8")
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPE_CODES = {"uint16": 8, "int32": 4}
_HEADER = struct.Struct("<QBQQ")
_CHUNK_ITEMS = 2**20


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 below 65500 entries, else int32: megatron-core's own rule."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def write_index(
    prefix: str | Path,
    dtype: np.dtype,
    documents: int,
    lengths: Callable[[], Iterable[np.ndarray]],
    offsets: Callable[[], Iterable[np.ndarray]] | None = None,
) -> None:
    """Write PREFIX.idx for documents of one sequence each, in pieces.

    Args:
        dtype: of the ids in PREFIX.bin.
        documents: how many.
        lengths: gives the lengths in tokens, int32, in pieces; called once or twice.
        offsets: gives where they start in PREFIX.bin, in bytes, int64. Default: one after the other.
    """
    with open(f"{prefix}.idx", "wb") as out:
        write(out, _MAGIC + _HEADER.pack(1, _DTYPE_CODES[dtype.name], documents, documents + 1))
        for piece in lengths():
            write(out, piece.astype(LENGTH).tobytes())
        for piece in offsets() if offsets else _offsets(lengths(), dtype.itemsize):
            write(out, piece.astype(_OFFSET).tobytes())
        for start in range(0, documents + 1, _CHUNK_ITEMS):
            write(out, np.arange(start, min(start + _CHUNK_ITEMS, documents + 1), dtype=_OFFSET).tobytes())
        sync(out)


def _offsets(lengths: Iterable[np.ndarray], itemsize: int) -> Iterator[np.ndarray]:
    done = 0
    for piece in lengths:
        ends = done + np.cumsum(piece, dtype=np.int64) * itemsize
        yield np.concatenate([[done], ends[:-1]]) if piece.size else ends
        done = int(ends[-1]) if piece.size else done


@dataclass(frozen=True)
class IndexSummary:
    """The index of a dataset."""

    documents: int
    tokens: int
    dtype: np.dtype
    stored_tokens: int
    """Tokens in the .bin, and bytes in a loss mask: more than `tokens` for a view."""


@dataclass(frozen=True)
class DocumentIndex:
    """The whole of an index, for documents of one sequence each."""

    dtype: np.dtype
    lengths: np.ndarray
    """[documents] int32: tokens of each."""
    offsets: np.ndarray
    """[documents] int64: byte in the .bin at which each starts."""


def read_index(prefix: str | Path) -> IndexSummary:
    """Sizes from PREFIX.idx, compared with the size of PREFIX.bin.

    Raises:
        ValueError: a file is missing, is not of this format, or is shorter than the index says.
    """
    index, documents = _load_index(Path(prefix))
    data, itemsize = Path(f"{prefix}.bin"), index.dtype.itemsize
    tokens, size = int(index.lengths.sum(dtype=np.int64)), data.stat().st_size
    if data.is_symlink():
        wanted = int((index.offsets + index.lengths.astype(np.int64) * itemsize).max(initial=0))
        fits = size >= wanted and size % itemsize == 0
    else:
        wanted = tokens * itemsize
        fits = size == wanted
    if not fits or tokens < 0:
        raise ValueError(
            f"{data} has {size} bytes, {prefix}.idx describes {wanted}: a copy was cut short, or the two do not belong "
            "together"
        )
    return IndexSummary(documents, tokens, index.dtype, size // itemsize)


def load_index(prefix: str | Path) -> DocumentIndex:
    """Lengths and places of all documents.

    Raises:
        ValueError: as `read_index` and `check_index`.
    """
    check_index(prefix)
    return _load_index(Path(prefix))[0]


def check_index(prefix: str | Path) -> None:
    """Look through all of PREFIX.idx: that lengths are such, that every document lies in PREFIX.bin, and that the
    documents of a dataset that is no view follow each other without a gap.

    Raises:
        ValueError: as `read_index`; the error names the first impossible document.
    """
    read_index(prefix)
    index, documents = _load_index(Path(prefix))
    data, itemsize = Path(f"{prefix}.bin"), index.dtype.itemsize
    bytes_of = index.lengths.astype(np.int64) * itemsize
    # Places that are no places must not overflow a sum.
    wrong = (index.lengths < 0) | (index.offsets < 0) | (index.offsets > data.stat().st_size - bytes_of)
    wrong |= index.offsets % itemsize != 0
    if not data.is_symlink():
        wrong |= index.offsets != np.cumsum(bytes_of) - bytes_of
    if wrong.any():
        number = int(wrong.argmax())
        raise ValueError(
            f"{prefix}.idx is damaged: document {number} would have {index.lengths[number]} tokens from byte "
            f"{index.offsets[number]} of {data.name} on; copy it again, or prepare the data again"
        )
    starts = _document_starts(Path(f"{prefix}.idx"), index.lengths.size, documents + 1)
    if starts[0] != 0 or starts[-1] != index.lengths.size or (np.diff(starts) < 0).any():
        raise ValueError(
            f"{prefix}.idx is damaged: its table of documents does not rise from 0 to {index.lengths.size}; copy it "
            "again, or prepare the data again"
        )


def foreign_id(prefix: str | Path, vocab_size: int, tokens: int | None = None) -> str | None:
    """Look for an id outside a vocabulary.

    Args:
        tokens: how many of PREFIX.bin are looked at, from its start; None: all.

    Returns:
        A message that names the document of the first such id, to be continued by the vocabulary's name; None without
        such an id.
    """
    index, _ = _load_index(Path(prefix))
    ids = np.memmap(f"{prefix}.bin", index.dtype, "r") if index.lengths.any() else np.empty(0, index.dtype)
    for start in range(0, min(ids.size, tokens or ids.size), _CHUNK_ITEMS):
        piece = ids[start : start + _CHUNK_ITEMS]
        wrong = (piece >= vocab_size) | (piece < 0)
        if wrong.any():
            at = start + int(wrong.argmax())
            starts = index.offsets // index.dtype.itemsize
            document = np.flatnonzero((starts <= at) & (at < starts + index.lengths))
            where = f"document {document[0]}" if document.size else "no document"
            return f"{prefix}.bin, {where}, token {at}, holds id {ids[at]}, over the {vocab_size} entries"
    return None


def _document_starts(idx: Path, sequences: int, entries: int) -> np.ndarray:
    place = len(_MAGIC) + _HEADER.size + sequences * (LENGTH.itemsize + _OFFSET.itemsize)
    return np.fromfile(idx, _OFFSET, entries, offset=place)


def _load_index(prefix: Path) -> tuple[DocumentIndex, int]:
    """The index, and its number of documents."""
    data, idx = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    missing = [str(path) for path in (data, idx) if not path.is_file()]
    if missing:
        raise ValueError(
            f"missing {' and '.join(missing)}: prepare the data, or correct the path (a prefix without ending)"
        )
    with open(idx, "rb") as file:
        head = file.read(len(_MAGIC) + _HEADER.size)
        if not head.startswith(_MAGIC) or len(head) < len(_MAGIC) + _HEADER.size:
            raise ValueError(f"{idx} is not an index of megatron-core's indexed format")
        version, code, sequences, documents = _HEADER.unpack(head[len(_MAGIC) :])
        names = {number: name for name, number in _DTYPE_CODES.items()}
        if version != 1 or code not in names:
            raise ValueError(f"{idx}: version {version} with dtype code {code} is not supported (1 with 4 or 8 is)")
        # Before anything is read: the counts may be anything. What megatron-core appends for several kinds of data may
        # follow.
        needed = len(head) + sequences * (LENGTH.itemsize + _OFFSET.itemsize) + documents * _OFFSET.itemsize
        if needed > (found := idx.stat().st_size) or documents < 1:
            raise ValueError(
                f"{idx} is cut short or damaged: it describes {sequences} sequences in {documents - 1} documents, "
                f"which are {needed} bytes, but has {found}: copy it again"
            )
        lengths = np.fromfile(file, LENGTH, sequences)
        offsets = np.fromfile(file, _OFFSET, sequences)
    return DocumentIndex(np.dtype(names[code]), lengths, offsets), documents - 1


def write(file: BinaryIO, data: Any) -> None:
    """Write bytes or a buffer. An error, such as that of a full disk, names the file and how much was to be written."""
    with _named(file, memoryview(data).nbytes):
        file.write(data)


def sync(file: BinaryIO) -> None:
    """Flush a file to the disk, so that a later rename never shows a half-written one. Errors name it."""
    with _named(file):
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _named(file: BinaryIO, needed: int | None = None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(file.name)
        error.needed = needed  # see errors.describe_os_error
        raise
