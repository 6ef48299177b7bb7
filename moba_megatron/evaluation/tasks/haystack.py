"""Text in which statements hide: noise, a file, or a prepared dataset."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moba_megatron.evaluation.tasks.words import NOISE

if TYPE_CHECKING:
    from moba_megatron.corpus.tokenizer import Tokenizer

NOISE_NAME = "noise"
# Long words in pieces: a line of hexadecimal digits shall not decide how well a length is met.
_WORD = re.compile(r"\s*\S{1,12}")
_MOST_TOKENS = 2**22


@dataclass(frozen=True)
class Haystack:
    """Words of real text in their order (long ones in pieces), with the white space before them; without words, noise
    sentences.

    Attributes:
        name: `noise`, or the file or dataset that the words come from.
    """

    name: str = NOISE_NAME
    words: tuple[str, ...] = ()

    def draw(self, stream: random.Random, count: int) -> list[str]:
        """`count` words that follow each other, from a random place on, going round at the end of the text.

        The same stream gives the same beginning for any count.
        """
        if not self.words:
            drawn: list[str] = []
            while len(drawn) < count:
                drawn += [f" {word}" for word in stream.choice(NOISE).split()]
            return drawn[:count]
        start = stream.randrange(len(self.words))
        rounds = -(-(start + count) // len(self.words))
        return list((self.words * rounds)[start : start + count])


def load_haystack(source: str | None, tokenizer: Tokenizer) -> Haystack:
    """The haystack that a user names.

    Args:
        source: prefix of an indexed dataset that `tokenizer` made, a text file in UTF-8, or None or `noise` for noise
            sentences. Of a dataset the first four million tokens are taken.

    Raises:
        ValueError: nothing of that name, a text that is not UTF-8, or one without words.
    """
    if source in (None, NOISE_NAME):
        return Haystack()
    if Path(source).is_file():
        text = _read(Path(source))
    elif Path(f"{source}.idx").is_file():
        text = _decode(source, tokenizer)
    else:
        raise ValueError(
            f"haystack {source!r} is neither a text file nor the prefix of a dataset (PREFIX.bin, PREFIX.idx); "
            f"{NOISE_NAME!r} needs no text"
        )
    words = tuple(_WORD.findall(text))
    if not words:
        raise ValueError(f"haystack {source} has no words")
    return Haystack(str(source), words)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"haystack {path} is not UTF-8: {error.reason} at byte {error.start}") from error


def _decode(prefix: str, tokenizer: Tokenizer) -> str:
    """Text of the first documents of a dataset, which may be a view; they are joined by an empty line."""
    import numpy as np

    from moba_megatron.corpus.indexed import load_index

    index = load_index(prefix)
    stored = np.memmap(f"{prefix}.bin", index.dtype, "r") if index.lengths.any() else np.empty(0, index.dtype)
    before = np.cumsum(index.lengths, dtype=np.int64) - index.lengths
    taken = before < _MOST_TOKENS
    starts = index.offsets[taken] // index.dtype.itemsize
    pieces = [stored[start : start + length] for start, length in zip(starts, index.lengths[taken], strict=True)]
    ids = np.concatenate([stored[:0], *pieces])[:_MOST_TOKENS]
    if ids.size and ids.max() >= tokenizer.vocab_size:
        raise ValueError(f"haystack {prefix} holds id {ids.max()}, over the {tokenizer.vocab_size} of the tokenizer")
    ends = np.flatnonzero(ids == tokenizer.eod_id)
    documents = (part[part != tokenizer.eod_id] for part in np.split(ids, ends))
    return "\n\n".join(tokenizer.decode(part) for part in documents if part.size)
