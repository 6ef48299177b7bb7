"""Text as it comes: token ids in, pieces of text out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"


class TextStream:
    """Writes the text of tokens as soon as it is known.

    A character may take several tokens, and a tokenizer may put something between two tokens, so each new piece is the
    text of the last few tokens together less what they had without the newest; text that ends within a character waits
    for the next token.

    Args:
        decode: text of token ids.
        write: called with each piece.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], write: Callable[[str], object]):
        self._decode = decode
        self._write = write
        self._tokens: list[int] = []
        # Tokens up to `_written` are written; those from `_context` on are decoded again with each new one.
        self._context = 0
        self._written = 0

    def put(self, tokens: Sequence[int]) -> None:
        """Take new tokens."""
        self._tokens += tokens
        if self._pending().endswith(UNFINISHED):
            return
        self._flush()

    def end(self) -> None:
        """Write the text that was held back."""
        self._flush()

    def _pending(self) -> str:
        known = self._decode(self._tokens[self._context : self._written])
        return self._decode(self._tokens[self._context :])[len(known) :]

    def _flush(self) -> None:
        if self._written < len(self._tokens):
            self._write(self._pending())
            self._context, self._written = self._written, len(self._tokens)
