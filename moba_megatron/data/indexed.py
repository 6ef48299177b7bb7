"""megatron-core's indexed format, written in pieces of bounded size.

`PREFIX.bin` holds all token ids one after the other, uint16 or int32. `PREFIX.idx` holds: the magic `MMIDIDX\\0\\0`,
version 1 (uint64), a code for the dtype (uint8: 4 is int32, 8 is uint16), the number of sequences and one more than the
number of documents (uint64 each), the length of each sequence in tokens (int32), the byte offset of each in the .bin
(int64), and the first sequence of each document with the total at the end (int64). Here a document is one sequence that
ends in the end-of-document id.

Workers write *shards*: for each split a `.bin` with ids and a `.lengths` with int32 lengths. `merge` joins the shards
of a split into the indexed format, with memory that does not grow with their number or size. The bytes equal those of
megatron-core's own `IndexedDatasetBuilder` fed document by document, without importing it: workers start in a fraction
of a second.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

LENGTH = np.dtype("<i4")
_MAGIC = b"MMIDIDX\x00\x00"
_DTYPE_CODES = {"uint16": 8, "int32": 4}
_HEADER = struct.Struct("<QBQQ")
_CHUNK_BYTES = 16 * 2**20


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 below 65500 entries, else int32: megatron-core's own rule."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


class ShardWriter:
    """Writes the documents of one split of one shard: FOLDER/SPLIT.bin and FOLDER/SPLIT.lengths."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype, eod_id: int):
        self.dtype, self.eod_id = dtype, eod_id
        self.documents = 0
        self.tokens = 0
        self._bin: BinaryIO = open(folder / f"{split}.bin", "wb")
        self._lengths: BinaryIO = open(folder / f"{split}.lengths", "wb")

    def write(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        """Append documents.

        Args:
            ids: [tokens] integer ids of all documents, without end-of-document ids.
            lengths: [documents] number of ids of each.
        """
        lengths = lengths + 1
        if lengths.size and lengths.max() > np.iinfo(LENGTH).max:
            raise ValueError(
                f"a document of {lengths.max()} tokens does not fit the indexed format (2**31 - 1 at most)"
            )
        stream = np.full(ids.size + lengths.size, self.eod_id, self.dtype)
        inside = np.ones(stream.size, bool)
        inside[np.cumsum(lengths) - 1] = False
        stream[inside] = ids
        self._bin.write(stream.tobytes())
        self._lengths.write(lengths.astype(LENGTH).tobytes())
        self.documents += lengths.size
        self.tokens += stream.size

    def close(self) -> None:
        for file in (self._bin, self._lengths):
            sync(file)
            file.close()


@dataclass
class Merged:
    """What `merge` saw on its way."""

    documents: int
    tokens: int
    counts: np.ndarray
    """[vocab_size] int64: how often each id occurs."""
    length_buckets: np.ndarray
    """[32, 2] int64: documents and tokens of documents of 2**i to 2**(i+1) - 1 tokens."""
    longest: int


def merge(shards: list[Path], split: str, prefix: Path, dtype: np.dtype, vocab_size: int) -> Merged:
    """Join shards, in their order, into PREFIX.bin and PREFIX.idx.

    Raises:
        ValueError: a shard whose files do not fit each other, which means that a file was changed or lost.
    """
    merged = Merged(0, 0, np.zeros(vocab_size, np.int64), np.zeros((32, 2), np.int64), 0)
    with open(f"{prefix}.bin", "wb") as out:
        for shard in shards:
            lengths = np.fromfile(shard / f"{split}.lengths", LENGTH)
            _add_lengths(merged, lengths)
            written = sum(_copy_ids(shard / f"{split}.bin", out, dtype, merged.counts))
            if written != lengths.sum(dtype=np.int64):
                raise ValueError(
                    f"{shard} holds {written} tokens, its lengths say {lengths.sum()}: remove it and run again"
                )
        sync(out)
    with open(f"{prefix}.idx", "wb") as out:
        for chunk in _index_chunks(shards, split, dtype, merged.documents):
            out.write(chunk)
        sync(out)
    return merged


def _copy_ids(path: Path, out: BinaryIO, dtype: np.dtype, counts: np.ndarray) -> Iterator[int]:
    """Copy a shard's ids in chunks, count them, yield how many."""
    with open(path, "rb") as file:
        while data := file.read(_CHUNK_BYTES):
            out.write(data)
            ids = np.frombuffer(data, dtype)
            counts += np.bincount(ids, minlength=counts.size)
            yield ids.size


def _add_lengths(merged: Merged, lengths: np.ndarray) -> None:
    buckets = np.log2(lengths).astype(np.int64)
    merged.length_buckets[:, 0] += np.bincount(buckets, minlength=32)
    merged.length_buckets[:, 1] += np.bincount(buckets, lengths, minlength=32).astype(np.int64)
    merged.documents += lengths.size
    merged.tokens += int(lengths.sum(dtype=np.int64))
    merged.longest = max(merged.longest, int(lengths.max(initial=0)))


def _index_chunks(shards: list[Path], split: str, dtype: np.dtype, documents: int) -> Iterator[bytes]:
    yield _MAGIC + _HEADER.pack(1, _DTYPE_CODES[dtype.name], documents, documents + 1)
    for shard in shards:
        yield (shard / f"{split}.lengths").read_bytes()
    offset = 0
    for shard in shards:
        lengths = np.fromfile(shard / f"{split}.lengths", LENGTH)
        ends = offset + np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
        yield np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes() if lengths.size else b""
        offset = int(ends[-1]) if lengths.size else offset
    step = _CHUNK_BYTES // 8
    for start in range(0, documents + 1, step):
        yield np.arange(start, min(start + step, documents + 1), dtype="<i8").tobytes()


@dataclass(frozen=True)
class IndexSummary:
    """What the index of a dataset says."""

    documents: int
    tokens: int
    dtype: np.dtype


def read_index(prefix: str | Path) -> IndexSummary:
    """Sizes from PREFIX.idx, held against the size of PREFIX.bin.

    Raises:
        ValueError: a file is missing, is not of this format, or is shorter than the index says.
    """
    idx, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
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
            raise ValueError(f"{idx}: version {version} with dtype code {code} is not known here (1 with 4 or 8)")
        dtype = np.dtype(names[code])
        lengths = np.fromfile(file, LENGTH, sequences)
    tokens = int(lengths.sum(dtype=np.int64))
    if lengths.size != sequences or data.stat().st_size != tokens * dtype.itemsize:
        raise ValueError(
            f"{data} has {data.stat().st_size} bytes, {idx} speaks of {tokens * dtype.itemsize}: a copy was cut short, "
            "or the two do not belong together"
        )
    return IndexSummary(documents - 1, tokens, dtype)


def sync(file: BinaryIO) -> None:
    """Flush a file to the disk, so that a later rename never shows a half-written one."""
    file.flush()
    os.fsync(file.fileno())
