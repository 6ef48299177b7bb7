"""Shards: the output of one worker for one part of the corpus.

A shard is a folder WORK/shards/NUMBER that appears under its final name in one rename, complete, or not at all. For
each split it holds `SPLIT.bin` with ids, `SPLIT.lengths` with int32 lengths and, for data with a loss mask, a byte per
token in `SPLIT.mask`; for all of it `stats.json`. Where exact duplicates are to be dropped, `documents` holds a record
of 33 bytes for each document, in document order.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from pydantic import ValidationError

from moba_megatron.config import Section
from moba_megatron.corpus.indexed import LENGTH, sync, write

SPLITS = ("train", "validation")
MAX_LISTED = 1000
"""Skipped documents and duplicates that are listed by name; more are counted only."""

RECORD = np.dtype([("hash", "<u8", 2), ("split", "u1"), ("number", "<u8"), ("characters", "<u4"), ("bytes", "<u4")])
"""The input of the search for duplicates: hash of the text, place in SPLITS, number in the part, size."""


class TextSize(Section):
    documents: int = 0
    characters: int = 0
    bytes: int = 0

    def add(self, documents: int, characters: int, utf8_bytes: int) -> None:
        self.documents += documents
        self.characters += characters
        self.bytes += utf8_bytes


class SkippedRow(Section):
    number: int
    """In its part: see `sources.place_name`."""
    reason: str


class IncompleteRow(SkippedRow):
    present: list[str]
    """Its columns."""


class ShardStats(Section):
    """Contents of a shard's `stats.json`."""

    engine: str
    """What encoded it."""
    splits: dict[str, TextSize]
    hash: str
    """Over all documents of the part, in order, before filters."""
    filtered: int
    skipped: list[SkippedRow]
    skipped_total: int
    notes: dict[str, int] = {}
    """What is said of documents that are kept, and of how many."""
    complete: bool = True
    """Whether a row had all the columns that are read."""
    incomplete: IncompleteRow | None = None
    """The first row that lacks some."""

    @property
    def text_bytes(self) -> int:
        return sum(size.bytes for size in self.splits.values())


class SplitWriter:
    """Writes the documents of one split of one shard.

    Args:
        masked: also write which tokens count.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype, eod_id: int, masked: bool):
        self.dtype, self.eod_id = dtype, eod_id
        self._bin: BinaryIO = open(folder / f"{split}.bin", "wb")
        self._lengths: BinaryIO = open(folder / f"{split}.lengths", "wb")
        self._mask: BinaryIO | None = open(folder / f"{split}.mask", "wb") if masked else None

    def write(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        counts: np.ndarray | None = None,
        ends: np.ndarray | None = None,
    ) -> None:
        """Append documents.

        Args:
            ids: [tokens] integer ids of all documents, without end-of-document ids.
            lengths: [documents] number of ids of each.
            counts: [tokens] bool, which of the ids count in the loss; None: all.
            ends: [documents] bool, which of the end-of-document ids do; None: all.
        """
        lengths = lengths + 1
        if lengths.size and lengths.max() > np.iinfo(LENGTH).max:
            raise ValueError(
                f"a document of {lengths.max()} tokens does not fit the indexed format (2**31 - 1 at most)"
            )
        inside = np.ones(ids.size + lengths.size, bool)
        inside[np.cumsum(lengths) - 1] = False
        stream = np.full(inside.size, self.eod_id, self.dtype)
        stream[inside] = ids
        write(self._bin, stream.data)
        write(self._lengths, lengths.astype(LENGTH).data)
        if self._mask is not None:
            mask = np.ones(inside.size, np.uint8)
            mask[inside] = 1 if counts is None else counts
            mask[~inside] = 1 if ends is None else ends
            write(self._mask, mask.data)

    def close(self) -> None:
        for file in (self._bin, self._lengths, self._mask):
            if file is not None:
                sync(file)
                file.close()


def shard_folder(work: Path, number: int) -> Path:
    """Final name of the shard of part `number`."""
    return work / "shards" / f"{number:06d}"


def shard_stats(work: Path, number: int, engine: str) -> ShardStats | None:
    """The statistics of the shard of part `number`, or None if it is not there.

    A shard whose `stats.json` is lost or damaged, as after a power cut, or that another engine encoded, does not count;
    it is made again.
    """
    try:
        stats = ShardStats.model_validate_json((shard_folder(work, number) / "stats.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None
    return stats if stats.engine == engine else None


def remove_shard(work: Path, number: int) -> None:
    """Remove what there is of a shard, finished or not."""
    folder = shard_folder(work, number)
    for leftover in [folder, *folder.parent.glob(f"{folder.name}.*.unfinished")]:
        shutil.rmtree(leftover, ignore_errors=True)


def read_chunks(path: Path, dtype: np.dtype, chunk_bytes: int) -> Iterator[np.ndarray]:
    """A file as arrays of about `chunk_bytes`, so that memory does not grow with it.

    Raises:
        ValueError: the file does not hold whole items.
    """
    step = max(1, chunk_bytes // dtype.itemsize) * dtype.itemsize
    with open(path, "rb") as file:
        while data := file.read(step):
            if len(data) % dtype.itemsize:
                raise ValueError(f"{path} is cut short: remove its folder and run again")
            yield np.frombuffer(data, dtype)
