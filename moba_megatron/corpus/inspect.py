"""Inspect a prepared dataset: describe its manifest, show one document, check its files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moba_megatron.config.inside import named_file
from moba_megatron.corpus.indexed import DocumentIndex, foreign_id, load_index
from moba_megatron.corpus.loss_mask import check_loss_mask, loss_mask_path, open_loss_mask
from moba_megatron.corpus.manifest import MANIFEST_FILE, DatasetManifest, load_manifest
from moba_megatron.corpus.merge import file_hash
from moba_megatron.corpus.tokenizer import Tokenizer

_CHECKED_TOKENS = 2**24


def dataset_manifest(folder: Path) -> DatasetManifest:
    """The manifest of a dataset.

    Raises:
        ValueError: the folder holds none.
    """
    manifest = load_manifest(folder)
    if manifest is None:
        raise ValueError(
            f"{folder} is not a prepared dataset: it has no manifest.json; give the folder that prepare made"
        )
    return manifest


def describe(manifest: DatasetManifest) -> str:
    """The manifest as text: all but the identity."""
    lines = [
        f"made {manifest.created} in {manifest.seconds:.1f} s by: {manifest.command or 'unknown'}",
        "versions: " + ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    ]
    for source in manifest.sources:
        lines.append(
            f"source {source.kind} {source.path}: {source.inputs:,} inputs, {source.input_bytes:,} bytes, "
            f"{source.documents:,} documents, hash {source.hash}"
        )
    for name, split in manifest.splits.items():
        lines.append(f"lengths of {name} (tokens: documents, share of the tokens)")
        for bucket in split.lengths:
            share = bucket.tokens / split.tokens
            lines.append(f"  {bucket.at_least:>11,} or more: {bucket.documents:>11,} {share:>7.1%}")
    lines += [f"duplicate {entry.name} of {entry.first}" for entry in manifest.duplicates[:10]]
    return "\n".join([*lines, manifest.summary()])


@dataclass(frozen=True)
class TextPiece:
    """A stretch of a document."""

    counts: bool
    """Whether its tokens are targets that count in the loss."""
    tokens: int
    text: str


def read_document(folder: Path, split: str, number: int) -> list[TextPiece]:
    """Document `number` (from 0) of a split, cut where the loss mask changes.

    Raises:
        ValueError: no such split or document, or damaged files.
    """
    manifest = dataset_manifest(folder)
    if split not in manifest.splits:
        raise ValueError(f"{folder} has no split {split!r}, only {', '.join(manifest.splits)}")
    index, prefix = load_index(folder / split), folder / split
    if not 0 <= number < index.lengths.size:
        raise ValueError(f"--document {number}: {prefix} has the documents 0 to {index.lengths.size - 1}")
    offset, length = int(index.offsets[number]), int(index.lengths[number])
    ids = np.fromfile(f"{prefix}.bin", index.dtype, length, offset=offset)
    mask, start = open_loss_mask(prefix), offset // index.dtype.itemsize
    counts = np.ones(length, bool) if mask is None else mask[start : start + length] > 0
    edges = [0, *(np.flatnonzero(counts[1:] != counts[:-1]) + 1).tolist(), length]
    decode = Tokenizer(folder / "tokenizer").decode
    return [TextPiece(bool(counts[a]), b - a, decode(ids[a:b])) for a, b in zip(edges, edges[1:], strict=False)]


def check_dataset(folder: Path) -> Iterator[tuple[str, str | None]]:
    """(what was checked, what is wrong or None), one after the other; reads all files.

    Raises:
        ValueError: no manifest.
    """
    manifest = dataset_manifest(folder)
    try:
        found = Tokenizer(folder / "tokenizer").fingerprint
        wrong = (
            None if found == manifest.tokenizer.fingerprint else f"the manifest has another fingerprint than {found}"
        )
    except ValueError as error:
        wrong = str(error)
    yield "tokenizer", wrong
    for name, file in manifest.files.items():
        try:
            path = named_file(folder / MANIFEST_FILE, name)
        except ValueError as error:
            yield name, str(error)
            continue
        if not path.is_file():
            yield name, "missing: copy it again"
        elif path.stat().st_size != file.bytes:
            yield name, f"{path.stat().st_size} bytes, not {file.bytes}: copy it again"
        else:
            yield name, None if file_hash(path) == file.hash else "its bytes have changed: copy it again"
    for split in manifest.splits:
        try:
            _check_split(folder / split, manifest, split)
            yield f"documents of {split}", None
        except ValueError as error:
            yield f"documents of {split}", str(error)


def _check_split(prefix: Path, manifest: DatasetManifest, split: str) -> None:
    index, stats, tokenizer = load_index(prefix), manifest.splits[split], manifest.tokenizer
    found = index.lengths.size, int(index.lengths.sum(dtype=np.int64))
    if found != (stats.documents, stats.tokens):
        raise ValueError(
            f"{found[0]} documents and {found[1]} tokens, but the manifest says {stats.documents} and {stats.tokens}"
        )
    if (stats.target_tokens is not None) != loss_mask_path(prefix).is_file():
        raise ValueError(f"the manifest and {loss_mask_path(prefix)} do not match: copy the folder again")
    check_loss_mask(prefix, index.dtype.itemsize, wanted=stats.target_tokens is not None)
    ids = np.memmap(f"{prefix}.bin", index.dtype, "r")
    ends = _ends(index)
    for start in range(0, ends.size, _CHECKED_TOKENS):
        wrong = np.flatnonzero(ids[ends[start : start + _CHECKED_TOKENS]] != tokenizer.eod_id)
        if wrong.size:
            raise ValueError(f"document {start + wrong[0]} does not end in the end-of-document id {tokenizer.eod_id}")
    if wrong := foreign_id(prefix, tokenizer.vocab_size):
        raise ValueError(f"{wrong} of the tokenizer")


def _ends(index: DocumentIndex) -> np.ndarray:
    """[documents] number, in the .bin, of each document's last token."""
    return index.offsets // index.dtype.itemsize + index.lengths - 1
