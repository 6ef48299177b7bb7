"""Tokenizers: Hugging Face folders, byte-level BPE training, and fast exact encoding.

A tokenizer is a folder with `tokenizer.json`. Beside text and ids this package needs two things of it: the token that
ends a document, and a *fingerprint*, a hash of everything that decides which ids a text gets. Data carries the
fingerprint of its tokenizer, and training compares.

Encoding is done by `Encoder`: gigatoken where it can, which is one to two orders of magnitude faster than `tokenizers`,
held against `tokenizers` on samples. A document that contains the end-of-document token, literally or in what a
normalizer makes of it, is encoded by `tokenizers` with special tokens read as plain text, so that this id marks the
ends of documents and nothing else. A document with which that is not possible is refused.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moba_megatron.corpus.documents import CorpusError

END_OF_DOCUMENT = "<|endoftext|>"
# How GPT-4's tokenizer (cl100k_base) cuts text before merging: line ends stay apart from indentation, numbers have at
# most three digits. Half a percent fewer tokens on source code than GPT-2's pattern, and ten times faster in gigatoken.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILES = (
    *("tokenizer.json", _CONFIG_FILE, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    "generation_config.json",  # names further ids that end a text, for the export of what is trained
)
_EOD_KEY = "end_of_document"
_SAMPLE_TEXTS = 16
_SAMPLE_CHARACTERS = 2048


class EngineMismatch(Exception):
    """gigatoken gave other ids than `tokenizers`."""


class Tokenizer:
    """A Hugging Face tokenizer folder.

    Args:
        end_of_document: the token that ends a document. Default: as the folder says.

    Raises:
        ValueError: no `tokenizer.json` in the folder, or no token that ends documents.
    """

    def __init__(self, folder: str | Path, end_of_document: str | None = None):
        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(
                f"no tokenizer in {self.folder}: it needs a tokenizer.json, as written by "
                "transformers.AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)"
            )
        self.backend = tokenizers.Tokenizer.from_file(str(path))
        # A tokenizer.json may ask for both; a corpus must be neither cut nor padded.
        self.backend.no_truncation()
        self.backend.no_padding()
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        """One more than the largest id."""
        self.eod_token: str = _end_of_document(self.folder, vocabulary, end_of_document)
        """The token that ends a document."""
        self.eod_id: int = vocabulary[self.eod_token]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without any template (no BOS, no end-of-document)."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens included."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def encode_plain(self, text: str) -> list[int] | None:
        """Ids of a text in which special tokens are ordinary characters. None where it would still end in its middle:
        the end-of-document token is not a special one."""
        self.backend.encode_special_tokens = True
        try:
            ids = self.backend.encode(text, add_special_tokens=False).ids
        finally:
            self.backend.encode_special_tokens = False
        return None if self.eod_id in ids else ids

    @property
    def refusal(self) -> str:
        """Why a text that `encode_plain` has no ids for is left out."""
        return (
            f"contains {self.eod_token!r}, the end-of-document token, which is not special in tokenizer.json and so "
            "cannot be read as plain text"
        )

    @property
    def fingerprint(self) -> str:
        """Hash of what decides the ids: see `fingerprint`."""
        return _fingerprint(self.folder, self.eod_id)


class Encoder:
    """Encodes documents by one engine, the same ids by either.

    Args:
        engine: `gigatoken` or `tokenizers`; `choose_engine` says which.
    """

    def __init__(self, tokenizer: Tokenizer, engine: Literal["gigatoken", "tokenizers"]):
        self.tokenizer = tokenizer
        self.fast: Any = None
        if engine == "gigatoken":
            import gigatoken

            self.fast = gigatoken.Tokenizer(tokenizer.backend)

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """All ids of the texts in one array [tokens] int64, the number of ids of each text [texts] int64, and which
        texts cannot be encoded without the end-of-document id; those have no ids."""
        ids, lengths = self._encode(texts)
        ends = np.cumsum(lengths)
        marked = {number for number, text in enumerate(texts) if self.tokenizer.eod_token in text}
        marked.update(np.searchsorted(ends, np.flatnonzero(ids == self.tokenizer.eod_id), side="right").tolist())
        if not marked:
            return ids, lengths, []
        rows, refused = np.split(ids, ends[:-1]), []
        for number in sorted(marked):
            plain = self.tokenizer.encode_plain(texts[number])
            if plain is None:
                refused.append(number)
            rows[number] = np.asarray(plain or [], np.int64)
        return np.concatenate(rows), np.array([len(row) for row in rows], np.int64), refused

    def check(self, texts: list[str]) -> None:
        """Hold gigatoken against `tokenizers` on the beginnings of up to 16 of these texts, evenly spread.

        Raises:
            EngineMismatch: with the first text that differs.
        """
        if self.fast is None or not texts:
            return
        spread = sorted({number * len(texts) // _SAMPLE_TEXTS for number in range(_SAMPLE_TEXTS)})
        sample = [texts[n][:_SAMPLE_CHARACTERS] for n in spread if self.tokenizer.eod_token not in texts[n]]
        for text, ids, row in zip(sample, self.tokenizer.encode_batch(sample), self._rows(sample), strict=True):
            if not np.array_equal(ids, row):
                raise EngineMismatch(f"gigatoken and tokenizers give different ids for {text[:80]!r}...")

    def _rows(self, texts: list[str]) -> list[np.ndarray]:
        ids, lengths = self._encode(texts)
        return np.split(ids, np.cumsum(lengths)[:-1]) if texts else []

    def _encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        if not texts:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        if self.fast is None:
            rows = self.tokenizer.encode_batch(texts)
            lengths = np.array([len(row) for row in rows], np.int64)
            return np.fromiter((i for row in rows for i in row), np.int64, int(lengths.sum())), lengths
        import awkward

        # Never on gigatoken's own threads: processes are what runs in parallel here.
        rows = self.fast.encode_batch(texts, parallel=False)
        return awkward.to_numpy(awkward.flatten(rows)).astype(np.int64), awkward.to_numpy(awkward.num(rows))


def choose_engine(tokenizer: Tokenizer, wanted: Literal["auto", "tokenizers"]) -> tuple[str, str]:
    """(engine, reason): gigatoken if it is wanted, installed and knows this kind of tokenizer, else `tokenizers`."""
    if wanted == "tokenizers":
        return "tokenizers", "set in the recipe"
    if importlib.util.find_spec("gigatoken") is None:
        return "tokenizers", "gigatoken is not installed"
    try:
        Encoder(tokenizer, "gigatoken")
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        # Only its first line: places in gigatoken's source follow.
        return "tokenizers", f"gigatoken cannot load this tokenizer: {next(iter(str(error).splitlines()), '')}"
    return "gigatoken", "agrees with tokenizers on a sample of every shard"


def fingerprint(folder: str | Path, end_of_document: str | None = None) -> str:
    """Hash (32 hex digits) of what decides the ids that a tokenizer folder gives: normalizer, pre-tokenizer, model,
    added tokens and the end-of-document id. Chat templates, decoders, names and file layout do not enter.

    Args:
        end_of_document: as in `Tokenizer`.
    """
    return Tokenizer(folder, end_of_document).fingerprint


def train_bpe(texts: Iterable[str], vocab_size: int, folder: str | Path) -> Tokenizer:
    """Train a byte-level BPE and save it as a Hugging Face tokenizer folder. The same texts give the same tokenizer.

    Raises:
        CorpusError: too little text for that many entries.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    if backend.get_vocab_size() < vocab_size:
        raise CorpusError(
            f"the text yields {backend.get_vocab_size()} tokenizer entries, not tokenizer.vocab_size = {vocab_size}: "
            "give more text or ask for fewer entries"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_DOCUMENT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / _CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    return Tokenizer(folder)


def copy_tokenizer(source: str | Path, folder: str | Path, end_of_document: str | None) -> Tokenizer:
    """Copy a tokenizer folder; a named end-of-document token is written into the copy's `tokenizer_config.json`."""
    source, folder = Path(source), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if end_of_document is not None:
        config = {**_read_json(folder / _CONFIG_FILE), _EOD_KEY: end_of_document}
        (folder / _CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return Tokenizer(folder)


def _end_of_document(folder: Path, vocabulary: dict[str, int], named: str | None) -> str:
    config = _read_json(folder / _CONFIG_FILE)
    eos = config.get("eos_token") or _read_json(folder / "special_tokens_map.json").get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    named = named or config.get(_EOD_KEY)
    token = named or (END_OF_DOCUMENT if END_OF_DOCUMENT in vocabulary else eos)
    if token is None:
        raise CorpusError(f"{folder} names no eos_token: say which token ends a document (tokenizer.end_of_document)")
    if token not in vocabulary:
        raise CorpusError(f"the end-of-document token {token!r} is not in the vocabulary of {folder}")
    return token


def _fingerprint(folder: Path, eod_id: int) -> str:
    tree = _read_json(folder / "tokenizer.json")
    # Releases of `tokenizers` differ in how they write merges, and in whether they write settings that are off.
    model = {key: value for key, value in tree["model"].items() if value is not None and value is not False}
    model["merges"] = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])]
    parts = {
        "model": model,
        "normalizer": tree.get("normalizer"),
        "pre_tokenizer": tree.get("pre_tokenizer"),
        "added_tokens": tree.get("added_tokens"),
        "end_of_document": eod_id,
    }
    canonical = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
