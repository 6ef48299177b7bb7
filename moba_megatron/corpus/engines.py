"""Documents to ids: gigatoken where it can, `tokenizers` elsewhere.

Plain texts go through gigatoken, which is one to two orders of magnitude faster than `tokenizers` and is compared with
it on samples. Documents in segments (a prompt and its answer, the turns of a conversation) are encoded by `tokenizers`,
each as one text: it tells which characters a token covers, and a token belongs to the segment of its first character.

The end-of-document id marks the ends of documents. If a text contains the end-of-document token, directly or after
normalization, that token is encoded as plain text; all other special tokens keep their ids. If that is not possible,
the document is refused. Only the chat template of a conversation may write that token: the index keeps the ends of
documents, and training uses the index.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from moba_megatron.corpus.documents import Document
from moba_megatron.corpus.tokenizer import Beginnings, Tokenizer

Engine = Literal["gigatoken", "tokenizers"]

END_IN_TEXT = "documents contain the text of the end-of-document token, read as plain text"
PROMPT_RUNS_ON = "documents do not begin with the ids of their prompt: a token covers its end and the next text"

_SAMPLE_TEXTS = 16
_SAMPLE_CHARACTERS = 2048


class EngineMismatch(Exception):
    """gigatoken gave other ids than `tokenizers`."""


@dataclass
class Encoded:
    """The ids of some documents.

    Attributes:
        ids: [tokens] int64, of all documents.
        lengths: [documents] int64, number of ids of each.
        counts: [tokens] bool, which ids count in the loss; None: all.
        ends: [documents] bool, whether the end-of-document token of each counts; None: all.
        refused: numbers of the documents that have no ids, because of the end-of-document token.
        notes: for what the manifest counts, the numbers of the documents.
    """

    ids: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray | None = None
    ends: np.ndarray | None = None
    refused: list[int] = field(default_factory=list)
    notes: dict[str, list[int]] = field(default_factory=dict)


class Encoder:
    """Encodes documents; plain texts by one engine, the same ids by either.

    Args:
        engine: `choose_engine` says which.
        beginnings: ids that documents of each kind begin with. Default: none.
    """

    def __init__(self, tokenizer: Tokenizer, engine: Engine, beginnings: Beginnings | None = None):
        self.tokenizer, self.beginnings = tokenizer, beginnings or {}
        self.fast: Any = None
        if engine == "gigatoken":
            import gigatoken

            self.fast = gigatoken.Tokenizer(tokenizer.backend)

    def encode(self, documents: Sequence[Document]) -> Encoded:
        """The ids of documents of one kind, without end-of-document ids."""
        kinds = {document.kind for document in documents}
        assert len(kinds) <= 1, "documents of one source are of one kind"
        encoded = self._texts(documents) if kinds <= {"text"} else self._segmented(documents)
        begin = self.beginnings.get(next(iter(kinds), "text"), [])
        return _with_beginning(encoded, begin) if begin else encoded

    def check(self, documents: Sequence[Document]) -> None:
        """Compare gigatoken with `tokenizers` on the beginnings of up to 16 of these texts, evenly spread.

        Raises:
            EngineMismatch: with the first text that differs.
        """
        if self.fast is None or not documents or documents[0].kind != "text":
            return
        spread = sorted({number * len(documents) // _SAMPLE_TEXTS for number in range(_SAMPLE_TEXTS)})
        sample = [documents[n].text[:_SAMPLE_CHARACTERS] for n in spread]
        sample = [text for text in sample if self.tokenizer.eod_token not in text]
        if not sample:
            return
        ids, lengths = self._fast(sample)
        rows = np.split(ids, np.cumsum(lengths)[:-1])
        for text, expected, row in zip(sample, self.tokenizer.encode_batch(sample), rows, strict=True):
            if not np.array_equal(expected, row):
                raise EngineMismatch(f"gigatoken and tokenizers give different ids for {text[:80]!r}...")

    def _texts(self, documents: Sequence[Document]) -> Encoded:
        texts = [document.text for document in documents]
        ids, lengths = self._fast(texts)
        ends = np.cumsum(lengths)
        marked = {number for number, text in enumerate(texts) if self.tokenizer.eod_token in text}
        marked.update(np.searchsorted(ends, np.flatnonzero(ids == self.tokenizer.eod_id), side="right").tolist())
        if not marked:
            return Encoded(ids, lengths)
        rows, refused = np.split(ids, ends[:-1]), []
        for number in sorted(marked):
            plain = self.tokenizer.encode_plain(texts[number])
            if plain is None:
                refused.append(number)
            rows[number] = np.asarray(plain.ids if plain else [], np.int64)
        notes = {END_IN_TEXT: sorted(marked)}
        return Encoded(np.concatenate(rows), _lengths(rows), refused=refused, notes=notes)

    def _segmented(self, documents: Sequence[Document]) -> Encoded:
        whole = self.tokenizer.encode_with_offsets([document.text for document in documents])
        prompts = self.tokenizer.encode_batch([document.prompt for document in documents])
        rows, counts, refused = [], [], []
        ends = np.ones(len(documents), bool)
        notes: dict[str, list[int]] = {}
        for number, (document, encoding, prompt) in enumerate(zip(documents, whole, prompts, strict=True)):
            if document.kind != "chat" and self.tokenizer.eod_id in encoding.ids:
                encoding = self.tokenizer.encode_plain(document.text)
                notes.setdefault(END_IN_TEXT, []).append(number)
                if encoding is None:
                    refused.append(number)
                    rows.append(np.empty(0, np.int64))
                    counts.append(np.empty(0, bool))
                    continue
                plain = self.tokenizer.encode_plain(document.prompt)
                prompt = plain.ids if plain else prompt
            ids, flags = np.asarray(encoding.ids, np.int64), _flags(document, encoding.offsets)
            # A template may end a conversation by the token that ends documents, of which every document gets one.
            stop = ids.size
            if stop and ids[-1] == self.tokenizer.eod_id:
                stop, ends[number] = stop - 1, flags[-1]
            rows.append(ids[:stop])
            counts.append(flags[:stop])
            if encoding.ids[: len(prompt)] != prompt:
                notes.setdefault(PROMPT_RUNS_ON, []).append(number)
        return Encoded(np.concatenate(rows), _lengths(rows), np.concatenate(counts), ends, refused, notes)

    def _fast(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(all ids, number of ids of each text), by the engine."""
        if not texts:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        if self.fast is None:
            rows = self.tokenizer.encode_batch(texts)
            lengths = _lengths(rows)
            return np.fromiter((i for row in rows for i in row), np.int64, int(lengths.sum())), lengths
        import awkward

        # Never on gigatoken's own threads: processes are what runs in parallel here.
        rows = self.fast.encode_batch(texts, parallel=False)
        return awkward.to_numpy(awkward.flatten(rows)).astype(np.int64), awkward.to_numpy(awkward.num(rows))


def choose_engine(tokenizer: Tokenizer, wanted: Literal["auto", "tokenizers"], texts: bool) -> tuple[str, str]:
    """(engine, reason): gigatoken if it is wanted, installed and knows this kind of tokenizer, else `tokenizers`.

    Args:
        texts: whether there are plain texts to encode.
    """
    if wanted == "tokenizers":
        return "tokenizers", "set in the recipe"
    if not texts:
        return "tokenizers", "which separates prompts from answers"
    if importlib.util.find_spec("gigatoken") is None:
        return "tokenizers", "gigatoken is not installed"
    try:
        Encoder(tokenizer, "gigatoken")
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        # Only its first line: places in gigatoken's source follow.
        return "tokenizers", f"gigatoken cannot load this tokenizer: {next(iter(str(error).splitlines()), '')}"
    return "gigatoken", "agrees with tokenizers on a sample of every shard"


def _flags(document: Document, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """[tokens] bool: the flags of the segments in which the tokens begin."""
    ends = np.cumsum([len(text) for text, _ in document.segments])
    flags = np.array([flag for _, flag in document.segments])
    first = np.array([start for start, _ in offsets], np.int64)
    return flags[np.minimum(np.searchsorted(ends, first, side="right"), flags.size - 1)]


def _lengths(rows: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
    return np.array([len(row) for row in rows], np.int64)


def _with_beginning(encoded: Encoded, begin: list[int]) -> Encoded:
    """The same with these ids before each document, unless it begins with them already."""
    edges = np.cumsum(encoded.lengths)[:-1]
    rows = np.split(encoded.ids, edges)
    put = [row[: len(begin)].tolist() != begin for row in rows]
    start = np.asarray(begin, np.int64)
    counts = encoded.counts
    if counts is not None:
        parts = np.split(counts, edges)
        # What begins a prompt is part of it.
        counts = np.concatenate([
            np.concatenate([np.zeros(start.size * more, bool), part]) for part, more in zip(parts, put, strict=True)
        ])  # fmt: skip
    rows = [np.concatenate([start[: start.size * more], row]) for row, more in zip(rows, put, strict=True)]
    return replace(encoded, ids=np.concatenate(rows), lengths=_lengths(rows), counts=counts)
