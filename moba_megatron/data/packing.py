"""Which documents share a row: packing as integer arithmetic over the lengths of documents.

A document longer than a row is cut into pieces of a whole row and a rest. `document` gives each piece its own row.
`best_fit` puts each piece into the row whose free room is the smallest that holds it, longest pieces first (best-fit
decreasing, arXiv 2404.10830): only documents longer than a row are cut, and rows of real text end up more than 99%
full. Pieces of one length follow each other, so a row takes as many of them as it holds in one step; the different free
rooms are kept in one sorted list.

The last token of a document has no next token to predict, so a piece of one token is left out. Which documents meet in
a row follows from their lengths and, among equals, from the seed.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from moba_megatron.config import DataConfig


@dataclass(frozen=True)
class PackingRules:
    """How documents become rows. `kind` is `best_fit` or `document`; lengths are in tokens.

    min_document_length: shorter documents are left out.
    """

    kind: str
    row_length: int
    min_document_length: int

    @staticmethod
    def of(data: DataConfig) -> PackingRules:
        """The rules of a configuration that packs (`data.packing` is not `concatenate`)."""
        length = data.sequence_length
        shortest = 2 if data.packing == "best_fit" else data.min_document_length or length
        return PackingRules(data.packing, length, shortest)

    @property
    def min_piece(self) -> int:
        """A shorter rest of a cut document is left out."""
        return min(self.min_document_length, self.row_length)

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """The values for megatron-core's cache keys."""
        return asdict(self)


@dataclass(frozen=True)
class Packing:
    """Rows of pieces.

    pieces: [pieces, 3] int32: document, first token within it, number of tokens; row by row.
    rows: [rows + 1] int64: number of the first piece of each row, and of all pieces at the end.
    """

    pieces: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class PackingSummary:
    """Statistics of a packing of a dataset. `documents_cut` and `rows_of_one_document` are expected numbers where
    documents are concatenated. The latter are what trailing losses are made of where documents do not see each
    other."""

    kind: str
    row_length: int
    rows: int
    tokens: int
    documents: int
    documents_cut: float
    rows_of_one_document: float
    documents_left_out: int
    tokens_left_out: int

    @property
    def fill(self) -> float:
        """Share of the rows' tokens that is not padding."""
        return self.tokens / (self.rows * self.row_length) if self.rows else 0.0

    def __str__(self) -> str:
        cut = f"{self.documents_cut / max(self.documents, 1):.1%} of {self.documents:,} documents cut"
        rows = f"{self.rows:,} rows of {self.row_length:,} tokens ({self.rows_of_one_document:,.0f} of one document)"
        text = f"{self.kind}, {rows}, {self.fill:.2%} full, {cut}"
        if not self.tokens_left_out:
            return text
        share = self.tokens_left_out / (self.tokens + self.tokens_left_out)
        return f"{text}, {share:.2%} of the tokens left out ({self.documents_left_out:,} whole documents)"


def usable(lengths: np.ndarray, rules: PackingRules) -> tuple[int, int]:
    """(tokens that rows will hold, rows that there will be at least), without packing anything.

    >>> usable(np.array([5, 9, 1]), PackingRules("best_fit", 4, 2))
    (12, 3)
    """
    whole, rest = _parts(lengths, rules)
    tokens = int(whole.sum()) * rules.row_length + int(rest.sum())
    if rules.kind == "document":
        return tokens, int(whole.sum()) + int(np.count_nonzero(rest))
    return tokens, -(-tokens // rules.row_length)


def cut_documents(lengths: np.ndarray, rules: PackingRules) -> np.ndarray:
    """Pieces [pieces, 3] int32 (document, first token, tokens) of the documents that are long enough, in order.

    >>> cut_documents(np.array([5, 10, 1, 3]), PackingRules("best_fit", 4, 2)).tolist()
    [[0, 0, 4], [1, 0, 4], [1, 4, 4], [1, 8, 2], [3, 0, 3]]
    """
    whole, rest = _parts(lengths, rules)
    counts = whole + (rest > 0)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    tokens = np.where(number < whole[document], rules.row_length, rest[document])
    return np.stack([document, number * rules.row_length, tokens], axis=1).astype(np.int32)


def best_fit(sizes: np.ndarray, row_length: int) -> np.ndarray:
    """The row of each piece by best fit, [pieces] int64.

    Args:
        sizes: [pieces] tokens of each piece, falling, each 1 to `row_length`.

    >>> best_fit(np.array([7, 5, 4, 3, 3, 2]), 8).tolist()
    [0, 1, 2, 1, 2, 3]
    """
    rows = np.empty(len(sizes), np.int64)
    runs = np.append(np.flatnonzero(np.diff(sizes, prepend=0)), len(sizes))
    rooms: list[int] = []
    rows_with: dict[int, list[int]] = {}
    opened = 0
    for at, end in pairwise(runs.tolist()):
        size = int(sizes[at])
        while at < end and (best := bisect_left(rooms, size)) < len(rooms):
            room = rooms[best]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rows_with[room], rooms[best]
            # What is left of the room is smaller than any other that would do: it is the best fit again.
            taken = min(room // size, end - at)
            rows[at : at + taken] = row
            at += taken
            _give_room(rooms, rows_with, room - taken * size, [row])
        each = row_length // size
        full, last = divmod(end - at, each)
        rows[at:end] = opened + np.arange(end - at) // each
        _give_room(rooms, rows_with, row_length - each * size, range(opened, opened + full))
        opened += full
        if last:
            _give_room(rooms, rows_with, row_length - last * size, [opened])
            opened += 1
    return rows


def pack_documents(lengths: np.ndarray, rules: PackingRules, seed: int) -> Packing:
    """Put documents of these lengths into rows. The same lengths, rules and seed give the same rows."""
    pieces = cut_documents(lengths, rules)
    if rules.kind == "document":
        return Packing(pieces, np.arange(len(pieces) + 1))
    shuffled = pieces[np.random.RandomState([seed, 0]).permutation(len(pieces))]
    falling = shuffled[np.argsort(-shuffled[:, 2], kind="stable")]
    row = best_fit(falling[:, 2], rules.row_length)
    # Within a row, too, the order is by chance: where documents see each other, long ones must not always come first.
    order = np.lexsort([np.random.RandomState([seed, 1]).permutation(len(row)), row])
    return Packing(falling[order], np.append(0, np.cumsum(np.bincount(row))))


def row_order(rows: int, samples: int, seed: int) -> np.ndarray:
    """The row of each sample: every row once in each epoch, in a new order. [samples] uint32.

    Sample i is the same for any number of samples.
    """
    epochs = -(-samples // rows)
    orders = [np.random.RandomState([seed, 2 + epoch]).permutation(rows) for epoch in range(epochs)]
    return np.concatenate(orders)[:samples].astype(np.uint32) if orders else np.empty(0, np.uint32)


def summarise_packing(lengths: np.ndarray, packing: Packing, rules: PackingRules) -> PackingSummary:
    """Statistics of a packing of documents of these lengths."""
    tokens = int(packing.pieces[:, 2].sum(dtype=np.int64))
    used = np.unique(packing.pieces[:, 0])
    return PackingSummary(
        kind=rules.kind,
        row_length=rules.row_length,
        rows=len(packing.rows) - 1,
        tokens=tokens,
        documents=len(used),
        documents_cut=int(np.count_nonzero(lengths[used] > rules.row_length)),
        rows_of_one_document=int(np.count_nonzero(packing.pieces[:, 2] == rules.row_length)),
        documents_left_out=len(lengths) - len(used),
        tokens_left_out=int(lengths.sum(dtype=np.int64)) - tokens,
    )


def summarise_concatenation(lengths: np.ndarray, row_length: int) -> PackingSummary:
    """Statistics of joining documents of these lengths in random order and cutting the stream."""
    rows = max(int(lengths.sum(dtype=np.int64)) - 1, 0) // row_length
    return PackingSummary(
        kind="concatenate",
        row_length=row_length,
        rows=rows,
        tokens=rows * row_length,
        documents=len(lengths),
        documents_cut=float(np.minimum((lengths - 1) / row_length, 1.0).sum()),
        rows_of_one_document=float(np.maximum(lengths.astype(np.int64) - row_length + 1, 0).sum() / row_length),
        documents_left_out=0,
        tokens_left_out=0,
    )


def _give_room(rooms: list[int], rows_with: dict[int, list[int]], room: int, rows: Sequence[int]) -> None:
    """Note that these rows have so much free room."""
    if room and rows:
        if room not in rows_with:
            insort(rooms, room)
        rows_with.setdefault(room, []).extend(rows)


def _parts(lengths: np.ndarray, rules: PackingRules) -> tuple[np.ndarray, np.ndarray]:
    """Of each document: the number of whole rows that it fills, and the tokens of its last, shorter piece."""
    whole, rest = np.divmod(lengths.astype(np.int64), rules.row_length)
    rest[rest < rules.min_piece] = 0
    too_short = lengths < rules.min_document_length
    whole[too_short] = rest[too_short] = 0
    return whole, rest
