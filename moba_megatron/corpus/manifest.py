"""The manifest of a prepared dataset: its contents, its sources, and the command that made it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, ValidationError, field_validator

from moba_megatron import __version__
from moba_megatron.config import Section
from moba_megatron.corpus.length_table import length_table
from moba_megatron.corpus.merge import Merged

MANIFEST_FILE = "manifest.json"
_SHOWN = 10
_VERSIONS = ("tokenizers", "gigatoken", "datasets", "pyarrow", "numpy")


class SkippedEntry(Section):
    name: str
    """File and place in it."""
    reason: str
    """Why it is not a document."""


class DuplicateEntry(Section):
    name: str
    """File and place in it."""
    first: str
    """Where the text was first."""


class FileStats(Section):
    bytes: int
    hash: str
    """blake2b of 16 bytes."""


class SourceStats(Section):
    kind: str
    """As in the recipe."""
    path: str
    """As in the recipe; for the standard library, the folder it was found in."""
    inputs: int
    """Files, or 1 for a dataset."""
    input_bytes: int
    """Their size on disk."""
    documents: int
    """Documents taken, over both splits, without duplicates that were left out."""
    bytes: int | None
    """Their UTF-8 size. None in a blend."""
    hash: str
    """Hash over all documents read, in order: equal hashes, equal text. In a blend, of the dataset's index."""


class LengthBucket(Section):
    at_least: int
    """Tokens, a power of two; the bucket ends below the next one."""
    documents: int
    tokens: int


class SplitStats(Section):
    documents: int
    tokens: int
    """The end-of-document tokens included."""
    target_tokens: int | None = None
    """Those that count in the loss, by the loss mask; the others are prompts. None: there is no mask, all count."""
    characters: int | None
    """None for a view of a blend."""
    bytes: int | None
    """UTF-8 bytes of the text. None for a view of a blend."""
    longest: int
    """Tokens of the longest document."""
    lengths: list[LengthBucket]
    """Documents and tokens by length."""


class TokenizerStats(Section):
    fingerprint: str
    """Training refuses a tokenizer with another one."""
    vocab_size: int
    eod_token: str
    eod_id: int
    begin_of_documents: str = ""
    """The first token of texts, or of prompts if texts have none; conversations begin as their template says."""
    engine: str
    """Which library encoded."""
    engine_reason: str


class DatasetManifest(Section):
    """Written as `manifest.json` beside the data."""

    format: int = 1
    created: str
    """UTC time."""
    dtype: str
    """Of the ids in the .bin files."""
    splits: dict[str, SplitStats]
    """`train` and, unless the recipe keeps nothing apart, `validation`."""
    unigram_loss: float | None
    """Nats per token of the validation split under the frequencies of ids in the training split (one added to each):
    the loss of a model that knows only the frequency of each token. None without validation."""
    tokenizer: TokenizerStats
    sources: list[SourceStats]
    filtered: int
    """Documents left out by the recipe's filters."""
    skipped: list[SkippedEntry]
    """The first 1000 inputs that could not become documents."""
    skipped_total: int
    notes: dict[str, int] = {}
    """Notes about kept documents, and the number of each (with duplicates that were left out)."""
    duplicates: list[DuplicateEntry] = []
    """Documents left out because their text was there before, the first 1000."""
    duplicates_total: int = 0
    files: dict[str, FileStats] = {}
    """The data files; what `prepare inspect --check` compares with."""
    command: str = ""
    """That finished the dataset."""
    identity: dict[str, Any]
    """The identity that another `prepare` into the same folder must have: recipe, inputs, tokenizer."""
    seconds: float = Field(ge=0)
    """Wall time of the process that finished the dataset."""
    workers: int
    versions: dict[str, str]
    digest: str | None = None
    """blake2b of all the rest, against damage; it is not a signature. Known in the file alone."""

    @field_validator("files", "splits")
    @classmethod
    def _within_the_folder(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if name in ("", ".", "..") or "/" in name or "\0" in name:
                raise ValueError(f"it names {name!r}, which is not a file of its own folder")
        return value

    def save(self, folder: Path) -> None:
        values = self.model_dump(mode="json", exclude={"digest"})
        text = json.dumps({**values, "digest": _digest(values)}, indent=2, ensure_ascii=False)
        (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")

    def summary(self) -> str:
        """A few lines for people."""
        tokenizer = self.tokenizer
        lines = [
            *(_split_line(name, split) for name, split in self.splits.items()),
            f"tokenizer: {tokenizer.vocab_size:,} entries, fingerprint {tokenizer.fingerprint}, encoded by "
            f"{tokenizer.engine} ({tokenizer.engine_reason})",
        ]
        if tokenizer.begin_of_documents:
            lines.append(f"documents begin with {tokenizer.begin_of_documents!r}")
        if self.unigram_loss is not None:
            lines.append(f"loss of a unigram model on the validation split: {self.unigram_loss:.3f} nats a token")
        left_out = [
            f"{count:,} {why}"
            for count, why in (
                (self.filtered, "by filters"),
                (self.duplicates_total, "duplicates"),
                (self.skipped_total, "for the reasons below"),
            )
            if count
        ]
        if left_out:
            lines.append(f"left out: {', '.join(left_out)}")
        lines += [f"  {entry.name}: {entry.reason}" for entry in self.skipped[:_SHOWN]]
        if self.skipped_total > _SHOWN:
            lines.append(f"  ... and {self.skipped_total - _SHOWN:,} more (see {MANIFEST_FILE})")
        lines += [f"note: {count:,} {what}" for what, count in self.notes.items()]
        return "\n".join(lines)


def _split_line(name: str, split: SplitStats) -> str:
    size = "" if split.bytes is None else f", {split.bytes / 1e6:,.1f} MB"
    rate = "" if split.bytes is None else f" ({split.bytes / max(1, split.tokens):.2f} bytes a token)"
    mask = "" if split.target_tokens is None else f" of which {split.target_tokens:,} count in the loss"
    longest = f"longest {split.longest:,} tokens"
    return f"{name}: {split.documents:,} documents, {split.tokens:,} tokens{mask}{size}{rate}, {longest}"


def load_manifest(folder: str | Path) -> DatasetManifest | None:
    """The manifest of a dataset folder, or None if it has none.

    Raises:
        ValueError: a file of that name that is something else.
    """
    path = Path(folder) / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        manifest = DatasetManifest.model_validate_json(data := path.read_bytes())
    except ValidationError as error:
        raise ValueError(
            f"{path} is not a manifest of this version ({error.errors()[0]['msg']}): prepare again"
        ) from error
    # Manifests of earlier versions have none.
    if manifest.digest is not None:
        values = json.loads(data)
        if values.pop("digest") != _digest(values):
            raise ValueError(f"{path} was changed after it was written: copy it again, or prepare again")
    return manifest.model_copy(update={"digest": None})


def _digest(values: dict[str, Any]) -> str:
    canonical = json.dumps(values, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def length_buckets(lengths: np.ndarray) -> list[LengthBucket]:
    """Documents and tokens by length, of lengths [documents] or of a table [32, 2] of both for each power of two."""
    table = length_table(lengths) if lengths.ndim == 1 else lengths
    return [
        LengthBucket(at_least=2**power, documents=int(documents), tokens=int(tokens))
        for power, (documents, tokens) in enumerate(table)
        if documents
    ]


def split_stats(merged: Merged, characters: int, utf8_bytes: int, masked: bool) -> SplitStats:
    """Statistics of a merged split."""
    return SplitStats(
        documents=merged.documents,
        tokens=merged.tokens,
        target_tokens=merged.target_tokens if masked else None,
        characters=characters,
        bytes=utf8_bytes,
        longest=merged.longest,
        lengths=length_buckets(merged.length_buckets),
    )


def unigram_loss(train_counts: np.ndarray, validation_counts: np.ndarray) -> float:
    """Cross entropy, in nats per token, of one set of counts [vocab_size] under the add-one frequencies of another."""
    log_share = np.log((train_counts + 1) / (train_counts + 1).sum())
    return float(-(validation_counts * log_share).sum() / validation_counts.sum())


def plot_lengths(splits: dict[str, SplitStats], path: Path) -> None:
    """A picture of documents and tokens by document length, for each split."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3 * len(splits)), layout="constrained")
    for number, (name, split) in enumerate(splits.items(), start=1):
        axes = figure.add_subplot(len(splits), 1, number)
        starts = np.array([bucket.at_least for bucket in split.lengths])
        shares = [
            ("documents", [bucket.documents / split.documents for bucket in split.lengths], -0.2),
            ("tokens", [bucket.tokens / split.tokens for bucket in split.lengths], 0.2),
        ]
        for label, values, shift in shares:
            axes.bar(np.log2(starts) + 0.5 + shift, values, width=0.4, label=f"share of {label}")
        axes.set_xticks(np.log2(starts), [f"{start:,}" for start in starts], rotation=30)
        axes.set_title(f"{name}: {split.documents:,} documents, {split.tokens:,} tokens")
        axes.set_xlabel("tokens in the document")
        axes.legend()
    FigureCanvasAgg(figure).print_png(str(path))


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide the result; what is not installed is left out."""
    found = {"moba-megatron": __version__, "python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
