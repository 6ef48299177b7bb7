"""The work of one worker: read a part of a source, divide its documents into splits, encode them, write a shard.

A worker process ends itself when the process that started it is gone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import socket
import threading
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moba_megatron.corpus.chat import ChatTemplate
from moba_megatron.corpus.documents import MIB, Document, Filtered, Incomplete, Part, Skipped
from moba_megatron.corpus.engines import Encoder, Engine
from moba_megatron.corpus.indexed import sync, token_dtype, write
from moba_megatron.corpus.recipe import Filters, Recipe, RowsSource, SourceBase
from moba_megatron.corpus.shards import (
    MAX_LISTED,
    RECORD,
    SPLITS,
    IncompleteRow,
    ShardStats,
    SkippedRow,
    SplitWriter,
    TextSize,
    remove_shard,
    shard_folder,
)
from moba_megatron.corpus.sources import read_part
from moba_megatron.corpus.tokenizer import Beginnings, Tokenizer

_BATCH_BYTES = 4 * MIB
_BATCH_DOCUMENTS = 4096


@dataclass
class Progress:
    """The progress of all workers, for the progress bar of the process that shows it."""

    text: Synchronized[int]
    """UTF-8 bytes of text read and encoded."""
    input: Synchronized[int]
    """Bytes of the parts, as in their sizes."""

    @staticmethod
    def add(counter: Synchronized[int], number: int) -> None:
        with counter.get_lock():
            counter.value += number


_progress: Progress | None = None


@dataclass(frozen=True)
class EncodeJob:
    """Settings that all shards of a dataset share."""

    recipe_json: str
    work: Path
    tokenizer: str
    """Fingerprint of the one in WORK/tokenizer."""
    chat_template: str | None
    """Fingerprint of its chat template, if that is used."""
    engine: Engine
    beginnings: str
    """Ids that documents of each kind begin with, as JSON."""


@dataclass
class _Batch:
    documents: list[Document] = field(default_factory=list)
    splits: list[int] = field(default_factory=list)
    """Place of each document's split in SPLITS."""
    bytes: int = 0

    def add(self, document: Document, split: str) -> None:
        self.documents.append(document)
        self.splits.append(SPLITS.index(split))
        self.bytes += document.bytes

    @property
    def full(self) -> bool:
        return self.bytes >= _BATCH_BYTES or len(self.documents) >= _BATCH_DOCUMENTS


def choose_split(recipe: Recipe, source: SourceBase, document: Document) -> str | None:
    """The split of a document, or None when a filter leaves it out."""
    filters, length = recipe.filters, document.characters
    if length < filters.min_characters or (filters.max_characters is not None and length > filters.max_characters):
        return None
    if source.split != "hash":
        return source.split
    return "validation" if document.split_hash < recipe.split.validation * 2**64 else "train"


def encode_part(job: EncodeJob, number: int, part: Part) -> None:
    """Read, encode and write one part, and replace any earlier output of it.

    Raises:
        EngineMismatch: gigatoken and `tokenizers` differ on the sample.
        CorpusError: the part cannot be read as its source says.
        OSError: the file system failed.
    """
    remove_shard(job.work, number)
    final = shard_folder(job.work, number)
    folder = final.with_name(f"{final.name}.{socket.gethostname()}.{os.getpid()}.unfinished")
    folder.mkdir(parents=True)
    try:
        stats = _Shard(job, folder).fill(part)
        with open(folder / "stats.json", "wb") as file:
            write(file, stats.model_dump_json().encode())
            sync(file)
        folder.rename(final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Shard:
    """A shard in the making, in `folder`."""

    def __init__(self, job: EncodeJob, folder: Path):
        self.recipe, self.encoder = _recipe(job.recipe_json), _encoder(job)
        tokenizer = self.encoder.tokenizer
        dtype, masked = token_dtype(tokenizer.vocab_size), self.recipe.masked
        self.writers = [SplitWriter(folder, split, dtype, tokenizer.eod_id, masked) for split in SPLITS]
        drops = self.recipe.filters.exact_duplicates == "drop"
        self.records: BinaryIO | None = open(folder / "documents", "wb") if drops else None
        self.stats = ShardStats(
            engine=job.engine,
            splits={split: TextSize() for split in SPLITS},
            hash="",
            filtered=0,
            skipped=[],
            skipped_total=0,
            complete=False,
        )
        self.template = functools.partial(_template, job)

    def fill(self, part: Part) -> ShardStats:
        """Read the part to its end and write all of it."""
        source, digest, stats = self.recipe.sources[part.source], hashlib.blake2b(digest_size=16), self.stats
        template = self.template() if isinstance(source, RowsSource) and source.messages_column else None
        batch, checked = _Batch(), False
        # Told of every row; passed on in larger steps.
        done = told = 0

        def advance(size: int, all_of_it: bool = False) -> None:
            nonlocal done, told
            done = part.size if all_of_it else min(part.size, done + size)
            if _progress is not None and (all_of_it or done - told > _BATCH_BYTES // 8):
                _progress.add(_progress.input, done - told)
                told = done

        for item in read_part(source, part, self.recipe.filters, template, advance):
            if isinstance(item, Skipped):
                self._skip(item)
                continue
            stats.complete = True
            split = None
            if not isinstance(item, Filtered):
                digest.update(item.digest)
                split = choose_split(self.recipe, source, item)
            if split is None:
                stats.filtered += 1
                continue
            batch.add(item, split)
            if batch.full:
                self._flush(batch, check=not checked)
                batch, checked = _Batch(), True
        self._flush(batch, check=not checked)
        for file in self.writers:
            file.close()
        if self.records is not None:
            sync(self.records)
            self.records.close()
        advance(0, all_of_it=True)
        stats.hash = digest.hexdigest()
        # Rows that only the tokenizer refuses are found later than others.
        stats.skipped.sort(key=lambda row: row.number)
        return stats

    def _skip(self, item: Skipped) -> None:
        stats = self.stats
        stats.skipped_total += 1
        if len(stats.skipped) < MAX_LISTED:
            stats.skipped.append(SkippedRow(number=item.number, reason=item.reason))
        if isinstance(item, Incomplete) and stats.incomplete is None:
            stats.incomplete = IncompleteRow(number=item.number, reason=item.reason, present=list(item.present))

    def _flush(self, batch: _Batch, check: bool) -> None:
        splits, kept = np.array(batch.splits, np.uint8), np.ones(len(batch.splits), bool)
        skipped = self.stats.skipped_total
        for code, writer in enumerate(self.writers):
            rows = np.flatnonzero(splits == code)
            if rows.size:
                kept[rows] = self._encode([batch.documents[row] for row in rows], writer, check)
        records = _records(batch, splits)[kept]
        for code, split in enumerate(SPLITS):
            own = records[records["split"] == code]
            self.stats.splits[split].add(
                own.size, int(own["characters"].sum(dtype=np.int64)), int(own["bytes"].sum(dtype=np.int64))
            )
        self.stats.filtered += kept.size - records.size - (self.stats.skipped_total - skipped)
        if self.records is not None:
            write(self.records, records.tobytes())
        if _progress is not None:
            _progress.add(_progress.text, batch.bytes)

    def _encode(self, documents: list[Document], writer: SplitWriter, check: bool) -> np.ndarray:
        """Encode and write documents of one split; return which of them the tokenizer and the filters by tokens
        keep."""
        if check:
            self.encoder.check(documents)
        encoded = self.encoder.encode(documents)
        ids, lengths, counts, ends = encoded.ids, encoded.lengths, encoded.counts, encoded.ends
        taken = np.ones(len(documents), bool)
        for number in encoded.refused:
            taken[number] = False
            self._skip(Skipped(documents[number].number, self.encoder.tokenizer.refusal))
        kept = _within(self.recipe.filters, lengths + 1) & taken
        for number, document in enumerate(documents):
            for note in document.notes:
                encoded.notes.setdefault(note, []).append(number)
        for note, numbers in encoded.notes.items():
            self.stats.notes[note] = self.stats.notes.get(note, 0) + int(kept[numbers].sum())
        if not kept.all():
            inside = np.repeat(kept, lengths)
            ids, lengths = ids[inside], lengths[kept]
            counts = None if counts is None else counts[inside]
            ends = None if ends is None else ends[kept]
        writer.write(ids, lengths, counts, ends)
        return kept


def _within(filters: Filters, lengths: np.ndarray) -> np.ndarray:
    """Which documents of so many tokens, the end-of-document token included, the filters keep."""
    kept = lengths >= (filters.min_tokens or 0)
    return kept if filters.max_tokens is None else kept & (lengths <= filters.max_tokens)


def _records(batch: _Batch, splits: np.ndarray) -> np.ndarray:
    records = np.empty(len(batch.documents), RECORD)
    records["hash"] = np.frombuffer(b"".join(d.digest for d in batch.documents), "<u8").reshape(-1, 2)
    records["split"] = splits
    records["number"] = [document.number for document in batch.documents]
    records["characters"] = [document.characters for document in batch.documents]
    records["bytes"] = [document.bytes for document in batch.documents]
    return records


@functools.lru_cache(maxsize=1)
def _recipe(recipe_json: str) -> Recipe:
    return Recipe.model_validate_json(recipe_json)


@functools.lru_cache(maxsize=1)
def _encoder(job: EncodeJob) -> Encoder:
    beginnings: Beginnings = json.loads(job.beginnings)
    return Encoder(Tokenizer(job.work / "tokenizer"), job.engine, beginnings)


@functools.lru_cache(maxsize=1)
def _template(job: EncodeJob) -> ChatTemplate:
    return ChatTemplate(job.work / "tokenizer", _recipe(job.recipe_json).chat)


def count_progress(progress: Progress) -> None:
    """From now on, add what this process does."""
    global _progress
    _progress = progress


def start_worker(progress: Progress) -> None:
    """First thing in a worker process: one core each, no reaction to Ctrl-C (the parent decides), no life without a
    parent."""
    count_progress(progress)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
