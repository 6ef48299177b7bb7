"""What one worker does: read a part of a source, divide its documents into splits, encode them, write a shard.

A shard is a folder that appears under its final name in one rename, complete, or not at all. It holds the ids and
lengths of each split and `stats.json`. A worker process ends itself when the process that started it is gone.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from moba_megatron.config import Section
from moba_megatron.data.documents import MIB, Document, Part, Skipped
from moba_megatron.data.indexed import ShardWriter, token_dtype
from moba_megatron.data.manifest import SkippedEntry
from moba_megatron.data.recipe import Recipe, SourceBase
from moba_megatron.data.sources import read_part
from moba_megatron.data.tokenizer import Encoder, Tokenizer

SPLITS = ("train", "validation")
MAX_SKIPPED = 1000
_BATCH_BYTES = 4 * MIB
_BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class Job:
    """What all shards of a dataset share."""

    recipe_json: str
    work: Path
    fingerprint: str
    """Of the tokenizer in WORK/tokenizer."""
    engine: Literal["gigatoken", "tokenizers"]


class TextSize(Section):
    documents: int = 0
    characters: int = 0
    bytes: int = 0


class ShardStats(Section):
    """Contents of a shard's `stats.json`."""

    splits: dict[str, TextSize]
    hash: str
    """Over all documents of the part, in order, before filters."""
    filtered: int
    skipped: list[SkippedEntry]
    skipped_total: int

    @property
    def text_bytes(self) -> int:
        return sum(size.bytes for size in self.splits.values())


@dataclass
class _Batch:
    texts: dict[str, list[str]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    documents: int = 0
    bytes: int = 0

    @property
    def full(self) -> bool:
        return self.bytes >= _BATCH_BYTES or self.documents >= _BATCH_DOCUMENTS


def choose_split(recipe: Recipe, source: SourceBase, document: Document) -> str | None:
    """The split of a document, or None when a filter leaves it out."""
    filters, length = recipe.filters, len(document.text)
    if length < filters.min_characters or (filters.max_characters is not None and length > filters.max_characters):
        return None
    if source.split != "hash":
        return source.split
    return "validation" if document.split_hash < recipe.split.validation * 2**64 else "train"


def shard_folder(work: Path, number: int) -> Path:
    """Final name of the shard of part `number`."""
    return work / "shards" / f"{number:06d}"


def has_shard(work: Path, number: int) -> bool:
    """Whether part `number` is done. A shard whose `stats.json` is lost or damaged, as after a power cut, is removed,
    to be made again."""
    shard = shard_folder(work, number)
    if not shard.is_dir():
        return False
    try:
        ShardStats.model_validate_json((shard / "stats.json").read_bytes())
    except (FileNotFoundError, ValidationError):
        shutil.rmtree(shard)
        return False
    return True


def encode_part(job: Job, number: int, part: Part) -> ShardStats:
    """Read, encode and write one part.

    Raises:
        EngineMismatch: gigatoken and `tokenizers` differ on the sample.
        CorpusError: the part cannot be read as its source says.
        OSError: the file system failed.
    """
    final = shard_folder(job.work, number)
    folder = final.with_name(f"{final.name}.{os.getpid()}.unfinished")
    folder.mkdir(parents=True)
    try:
        stats = _write_shard(job, part, folder)
        (folder / "stats.json").write_text(stats.model_dump_json())
        folder.rename(final)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return stats


def _write_shard(job: Job, part: Part, folder: Path) -> ShardStats:
    recipe, encoder = _recipe(job.recipe_json), _encoder(job)
    source, tokenizer = recipe.sources[part.source], encoder.tokenizer
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {split: ShardWriter(folder, split, dtype, tokenizer.eod_id) for split in SPLITS}
    sizes = {split: TextSize() for split in SPLITS}
    digest = hashlib.blake2b(digest_size=16)
    stats = ShardStats(splits=sizes, hash="", filtered=0, skipped=[], skipped_total=0)
    batch, checked = _Batch(), False
    for item in read_part(source, part):
        if isinstance(item, Skipped):
            _note_skipped(stats, item)
            continue
        digest.update(item.digest)
        split = choose_split(recipe, source, item)
        if split is None:
            stats.filtered += 1
            continue
        _add(batch, sizes[split], split, item)
        if batch.full:
            _flush(batch, encoder, writers, check=not checked)
            batch, checked = _Batch(), True
    _flush(batch, encoder, writers, check=not checked)
    for writer in writers.values():
        writer.close()
    stats.hash = digest.hexdigest()
    return stats


def _note_skipped(stats: ShardStats, item: Skipped) -> None:
    stats.skipped_total += 1
    if len(stats.skipped) < MAX_SKIPPED:
        stats.skipped.append(SkippedEntry(name=item.name, reason=item.reason))


def _add(batch: _Batch, size: TextSize, split: str, document: Document) -> None:
    batch.texts[split].append(document.text)
    batch.documents += 1
    batch.bytes += len(document.utf8)
    size.documents += 1
    size.characters += len(document.text)
    size.bytes += len(document.utf8)


def _flush(batch: _Batch, encoder: Encoder, writers: dict[str, ShardWriter], check: bool) -> None:
    for split, texts in batch.texts.items():
        if texts:
            if check:
                encoder.check(texts)
            writers[split].write(*encoder.encode(texts))


@functools.lru_cache(maxsize=1)
def _recipe(recipe_json: str) -> Recipe:
    return Recipe.model_validate_json(recipe_json)


@functools.lru_cache(maxsize=1)
def _encoder(job: Job) -> Encoder:
    return Encoder(Tokenizer(job.work / "tokenizer"), job.engine)


def start_worker() -> None:
    """First thing in a worker process: one core each, no reaction to Ctrl-C (the parent decides), no life without a
    parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
