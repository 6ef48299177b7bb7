"""Exact duplicates over the whole corpus, by the hashes that the shards hold.

Hashes of 16 bytes are spread by their value over files of about two million records, and each file is sorted by itself:
memory does not grow with the corpus. A document needs 33 bytes of disk in its shard, 24 bytes during the search, and
one bit of the result. Hash collisions are unlikely below about 2**64 documents.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moba_megatron.corpus.indexed import sync, write
from moba_megatron.corpus.shards import MAX_LISTED, RECORD, read_chunks

_BUCKET_RECORDS = 2**21
_MAX_BUCKETS = 512
_CHUNK_BYTES = 32 * 2**20
_NUMBERED = np.dtype([("hash", "<u8", 2), ("document", "<u8")])


@dataclass(frozen=True)
class Duplicates:
    """Which documents are not the first with their text. Documents are numbered over all shards, from 0."""

    total: int
    listed: list[tuple[int, int]]
    """(duplicate, first document with its text), the first 1000 in document order."""
    first_documents: np.ndarray
    """[shards + 1] int64: number of each shard's first document, and of all."""
    bits: np.memmap | None
    """[documents / 8] uint8, one bit a document: 1 for a duplicate. None without documents."""

    def kept(self, shard: int, records: np.ndarray, start: int) -> np.ndarray:
        """[records] bool: whether the documents of a piece of a shard's `documents` file, from record `start` of it,
        stay."""
        first = int(self.first_documents[shard]) + start
        assert self.bits is not None
        whole = np.unpackbits(self.bits[first // 8 : (first + records.size + 7) // 8], bitorder="little")
        return whole[first % 8 : first % 8 + records.size] == 0


def find_duplicates(shards: list[Path], work: Path) -> Duplicates:
    """Compare all documents of all shards.

    Args:
        shards: folders with `documents` files, in document order.
        work: folder for files of this search; made anew, left with the bits in it.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    sizes = [(shard / "documents").stat().st_size // RECORD.itemsize for shard in shards]
    first_documents = np.cumsum([0, *sizes], dtype=np.int64)
    documents = int(first_documents[-1])
    if not documents:
        return Duplicates(0, [], first_documents, None)
    buckets = min(_MAX_BUCKETS, -(-documents // _BUCKET_RECORDS))
    _spread(shards, work, buckets)
    bits = np.memmap(work / "bits", np.uint8, "w+", shape=-(-documents // 8))
    total, listed = 0, np.empty((0, 2), np.int64)
    for bucket in range(buckets):
        pairs = _pairs(np.fromfile(work / f"{bucket}", _NUMBERED))
        (work / f"{bucket}").unlink()
        np.bitwise_or.at(bits, pairs[:, 0] // 8, (1 << (pairs[:, 0] % 8)).astype(np.uint8))
        total += len(pairs)
        listed = np.concatenate([listed, pairs])
        listed = listed[np.argsort(listed[:, 0])[:MAX_LISTED]]
    return Duplicates(total, [(int(a), int(b)) for a, b in listed], first_documents, bits)


def _spread(shards: list[Path], work: Path, buckets: int) -> None:
    """Write each document's hash and number to the file of its bucket."""
    files = [open(work / f"{bucket}", "wb") for bucket in range(buckets)]
    for start, records in _all_records(shards):
        numbered = np.empty(records.size, _NUMBERED)
        numbered["hash"] = records["hash"]
        numbered["document"] = np.arange(start, start + records.size)
        places = (records["hash"][:, 0] % buckets).astype(np.int64)
        for bucket in np.unique(places):
            write(files[bucket], numbered[places == bucket].tobytes())
    for file in files:
        sync(file)
        file.close()


def _all_records(shards: list[Path]) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first document, records) of pieces of all shards."""
    start = 0
    for shard in shards:
        for records in read_chunks(shard / "documents", RECORD, _CHUNK_BYTES):
            yield start, records
            start += records.size


def _pairs(numbered: np.ndarray) -> np.ndarray:
    """[duplicates, 2] int64: each duplicate with the first document of its text."""
    numbered = numbered[np.lexsort((numbered["document"], numbered["hash"][:, 1], numbered["hash"][:, 0]))]
    hashes = numbered["hash"]
    fresh = np.ones(numbered.size, bool)
    fresh[1:] = (hashes[1:] != hashes[:-1]).any(axis=1)
    firsts = numbered["document"][np.maximum.accumulate(np.where(fresh, np.arange(numbered.size), 0))]
    return np.stack([numbered["document"][~fresh], firsts[~fresh]], axis=1).astype(np.int64)
