"""Tokenizers: Hugging Face folders, byte-level BPE training, and the fingerprint of a tokenizer.

A tokenizer is a folder with `tokenizer.json`. Beside text and ids this package needs two things of it: the token that
ends a document, and a *fingerprint*, a hash of everything that decides which ids a text gets. Data carries the
fingerprint of its tokenizer, and training compares.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moba_megatron.corpus.documents import CorpusError, Kind

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
Beginnings = dict[Kind, list[int]]
# In no text: a character for private use that nobody uses, and a word that tells a reader of an error what it is.
_NOWHERE = "\U0010fffd<end of document>"


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
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no other class
            raise ValueError(f"{path} is damaged: {error}; fetch it again") from error
        # A tokenizer.json may ask for both; a corpus must be neither cut nor padded.
        self.backend.no_truncation()
        self.backend.no_padding()
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"{path} is damaged: its vocabulary is empty; fetch it again")
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

    def encode_with_offsets(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """As `encode_batch`, with the characters (`offsets`) that each token covers."""
        return self._untrimmed.encode_batch(list(texts), add_special_tokens=False)

    def encode_plain(self, text: str) -> tokenizers.Encoding | None:
        """A text in which the end-of-document token is ordinary characters. None where its id would still be among
        the ids: the token is not a special one, or the vocabulary has its text as an ordinary entry."""
        if self._without_eod is None:
            return None
        encoding = self._without_eod.encode(text, add_special_tokens=False)
        return None if self.eod_id in encoding.ids else encoding

    @functools.cached_property
    def _untrimmed(self) -> tokenizers.Tokenizer:
        """Without the template, which may take the space before a word out of its offsets."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.post_processor = None
        return backend

    @functools.cached_property
    def _without_eod(self) -> tokenizers.Tokenizer | None:
        """As `_untrimmed`, but it does not know the end-of-document token. None if that changes other tokens."""
        tree = json.loads(self._untrimmed.to_str())
        own = next((token for token in tree["added_tokens"] if token["id"] == self.eod_id), None)
        if own is None or not own["special"]:
            return None
        expected = self.backend.get_vocab()
        # Unigram has pairs of entries and scores.
        entries = [entry if isinstance(entry, str) else entry[0] for entry in tree["model"].get("vocab", [])]
        if self.eod_token in entries:
            tree["added_tokens"].remove(own)
        else:
            # Its place stays taken, or the ids after it would move up.
            own["content"] = _NOWHERE
            expected[_NOWHERE] = expected.pop(self.eod_token)
        backend = tokenizers.Tokenizer.from_str(json.dumps(tree))
        return backend if backend.get_vocab() == expected else None

    @property
    def refusal(self) -> str:
        """Why a text that `encode_plain` has no ids for is left out."""
        return (
            f"contains {self.eod_token!r}, the end-of-document token, which cannot be read as plain text: it is not "
            "special in tokenizer.json, or an ordinary entry of the vocabulary as well"
        )

    @property
    def fingerprint(self) -> str:
        """Hash of all settings that decide the ids: see `fingerprint`."""
        return _fingerprint(self.folder, self.eod_id)

    def beginnings(self, begin_of_document: str) -> Beginnings:
        """Ids that documents of each kind begin with, for `tokenizer.begin_of_document` of a recipe.

        Raises:
            CorpusError: a token that the vocabulary does not have.
        """
        if begin_of_document == "none":
            return {}
        if begin_of_document == "auto":
            from transformers import PreTrainedTokenizerFast

            return {"prompt": text_start(PreTrainedTokenizerFast.from_pretrained(str(self.folder)))}
        number = self.backend.token_to_id(begin_of_document)
        if number is None:
            raise CorpusError(
                f"tokenizer.begin_of_document = {begin_of_document!r} is not in the vocabulary of {self.folder}: name "
                "one of its tokens, `auto` or `none`"
            )
        return {"text": [number], "prompt": [number]}


def fingerprint(folder: str | Path, end_of_document: str | None = None) -> str:
    """Hash (32 hex digits) of all settings of a tokenizer folder that decide its ids: normalizer, pre-tokenizer, model,
    added tokens and the end-of-document id. Chat templates, decoders, names and file layout do not enter.

    Args:
        end_of_document: as in `Tokenizer`.
    """
    return Tokenizer(folder, end_of_document).fingerprint


def text_start(tokenizer: Any) -> list[int]:
    """Ids that the template of a tokenizer of transformers puts before a text: mostly one for its beginning, or none.

    What a template puts after a text is left out of prompts, which go on.
    """
    some = tokenizer("a", return_special_tokens_mask=True)
    marked = zip(some.input_ids, some.special_tokens_mask, strict=True)
    return [token for token, _ in takewhile(lambda pair: pair[1], marked)]


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
    (folder / _CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Tokenizer(folder)


def copy_tokenizer(source: str | Path, folder: str | Path, end_of_document: str | None) -> Tokenizer:
    """Copy a tokenizer folder; a named end-of-document token is written into the copy's `tokenizer_config.json`."""
    source, folder = Path(source), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    copy_files(source, folder)
    if end_of_document is not None:
        config = {**_read_json(folder / _CONFIG_FILE), _EOD_KEY: end_of_document}
        (folder / _CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return Tokenizer(folder)


def copy_files(source: Path, folder: Path, names: Sequence[str] = TOKENIZER_FILES) -> None:
    """Copy the files of a tokenizer: the files of these names, and chat templates; `folder` is there."""
    for path in (*(source / name for name in names), *template_files(source)):
        if path.is_file():
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


def template_files(folder: Path) -> list[Path]:
    """Chat templates for other occasions, such as `tool_use`, which transformers keeps in a folder of their own."""
    return sorted((folder / "additional_chat_templates").glob("*.jinja"))


def _end_of_document(folder: Path, vocabulary: dict[str, int], named: str | None) -> str:
    config = _read_json(folder / _CONFIG_FILE)
    eos = config.get("eos_token") or _read_json(folder / "special_tokens_map.json").get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    named = named or config.get(_EOD_KEY)
    token = named or (END_OF_DOCUMENT if END_OF_DOCUMENT in vocabulary else eos)
    if token is not None and not isinstance(token, str):
        raise CorpusError(f"{folder} names {token!r} as eos_token, which is not a string: fetch {_CONFIG_FILE} again")
    if token is None:
        raise CorpusError(f"{folder} names no eos_token: name the token in tokenizer.end_of_document")
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
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}; fetch it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it does not hold an object; fetch it again")
    return found
