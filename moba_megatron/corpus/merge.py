"""Join shards, in their order, into the indexed format, in constant memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moba_megatron.corpus.duplicates import Duplicates
from moba_megatron.corpus.indexed import LENGTH, sync, write, write_index
from moba_megatron.corpus.length_table import length_table
from moba_megatron.corpus.loss_mask import loss_mask_path
from moba_megatron.corpus.shards import RECORD, SPLITS, read_chunks

_CHUNK_BYTES = 8 * 2**20
Runs = list[tuple[int, bool]]
"""Tokens of neighbouring documents that stay, or that are left out."""


@dataclass
class Merged:
    """Counts of a merge."""

    counts: np.ndarray
    """[vocab_size] int64: how often each id occurs."""
    documents: int = 0
    tokens: int = 0
    target_tokens: int = 0
    """Those that count in the loss."""
    longest: int = 0
    length_buckets: np.ndarray = field(default_factory=lambda: np.zeros((32, 2), np.int64))
    """[32, 2] int64: documents and tokens of documents of 2**i to 2**(i+1) - 1 tokens."""
    dropped: dict[int, np.ndarray] = field(default_factory=dict)
    """Of each shard that has some: [3] int64, documents, characters and UTF-8 bytes left out as duplicates."""
    hashes: dict[str, str] = field(default_factory=dict)
    """Of the files written, by their name."""


def merge(
    shards: list[Path],
    split: str,
    prefix: Path,
    dtype: np.dtype,
    vocab_size: int,
    masked: bool = False,
    duplicates: Duplicates | None = None,
) -> Merged:
    """Join shards into PREFIX.bin and PREFIX.idx.

    Args:
        masked: also join the loss masks.
        duplicates: documents to leave out.

    Raises:
        ValueError: a shard whose files do not fit each other, which means that a file was changed or lost.
    """
    merged, lengths_path = Merged(np.zeros(vocab_size, np.int64)), Path(f"{prefix}.lengths")
    data = _Output(Path(f"{prefix}.bin"))
    mask = _Output(loss_mask_path(prefix)) if masked else None
    with open(lengths_path, "wb") as lengths_out:
        for number, shard in enumerate(shards):
            with _Joined(shard / f"{split}.bin", dtype.itemsize) as ids_in:
                mask_in = _Joined(shard / f"{split}.mask", 1) if mask else None
                for lengths, kept in _documents(shard, number, split, duplicates, merged):
                    write(lengths_out, lengths[kept].tobytes())
                    _add_lengths(merged, lengths[kept])
                    runs = _runs(lengths, kept)
                    for piece in ids_in.copy(runs, data):
                        merged.counts += np.bincount(np.frombuffer(piece, dtype), minlength=vocab_size)
                    for piece in mask_in.copy(runs, mask) if mask and mask_in else ():
                        merged.target_tokens += int(np.count_nonzero(np.frombuffer(piece, np.uint8)))
                ids_in.expect_end()
                if mask_in:
                    mask_in.expect_end()
                    mask_in.file.close()
    if not masked:
        merged.target_tokens = merged.tokens
    write_index(prefix, dtype, merged.documents, lambda: read_chunks(lengths_path, LENGTH, _CHUNK_BYTES))
    lengths_path.unlink()
    merged.hashes = {output.path.name: output.close() for output in (data, mask) if output}
    index = Path(f"{prefix}.idx")
    merged.hashes[index.name] = file_hash(index)
    return merged


def file_hash(path: Path) -> str:
    """Hash of a file's bytes (32 hex digits)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


class _Output:
    """A file that is hashed while it is written."""

    def __init__(self, path: Path):
        self.path, self.file, self.digest = path, open(path, "wb"), hashlib.blake2b(digest_size=16)

    def write(self, data: bytes) -> None:
        write(self.file, data)
        self.digest.update(data)

    def close(self) -> str:
        sync(self.file)
        self.file.close()
        return self.digest.hexdigest()


class _Joined:
    """A file of a shard with `itemsize` bytes a token."""

    def __init__(self, path: Path, itemsize: int):
        self.path, self.itemsize = path, itemsize
        self.file: BinaryIO = open(path, "rb")

    def __enter__(self) -> _Joined:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def copy(self, runs: Runs, output: _Output) -> Iterator[bytes]:
        """Copy what stays; yield it in pieces."""
        for tokens, stays in runs:
            left = tokens * self.itemsize
            if not stays:
                self.file.seek(left, 1)
                continue
            while left:
                piece = self.file.read(min(left, _CHUNK_BYTES))
                if not piece:
                    raise ValueError(f"{self.path} is shorter than its lengths say: remove its folder and run again")
                output.write(piece)
                left -= len(piece)
                yield piece

    def expect_end(self) -> None:
        if self.file.tell() != self.path.stat().st_size:
            raise ValueError(
                f"{self.path} has {self.path.stat().st_size} bytes, its lengths say {self.file.tell()}: remove its "
                "folder and run again"
            )


def _documents(
    shard: Path, number: int, split: str, duplicates: Duplicates | None, merged: Merged
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(lengths, whether they stay) of pieces of a shard's documents of one split. Counts in `merged` what does not."""
    if duplicates is None or not duplicates.total:
        for lengths in read_chunks(shard / f"{split}.lengths", LENGTH, _CHUNK_BYTES):
            yield lengths, np.ones(lengths.size, bool)
        return
    start = 0
    with open(shard / f"{split}.lengths", "rb") as file:
        for records in read_chunks(shard / "documents", RECORD, _CHUNK_BYTES):
            stay = duplicates.kept(number, records, start)
            start += records.size
            own = records["split"] == SPLITS.index(split)
            gone = records[own & ~stay]
            sums = [int(gone[name].sum(dtype=np.int64)) for name in ("characters", "bytes")]
            if gone.size:
                merged.dropped[number] = merged.dropped.get(number, 0) + np.array([gone.size, *sums], np.int64)
            yield np.fromfile(file, LENGTH, int(own.sum())), stay[own]


def _runs(lengths: np.ndarray, stays: np.ndarray) -> Runs:
    """Neighbours with the same fate as one."""
    if not lengths.size:
        return []
    starts = np.flatnonzero(np.concatenate([[True], stays[1:] != stays[:-1]]))
    tokens = np.add.reduceat(lengths.astype(np.int64), starts)
    return [(int(n), bool(stays[start])) for n, start in zip(tokens, starts, strict=True)]


def _add_lengths(merged: Merged, lengths: np.ndarray) -> None:
    merged.length_buckets += length_table(lengths)
    merged.documents += lengths.size
    merged.tokens += int(lengths.sum(dtype=np.int64))
    merged.longest = max(merged.longest, int(lengths.max(initial=0)))
