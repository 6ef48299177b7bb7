"""Streaming writes what decoding all tokens at once gives, piece by piece, and never half a character."""

from __future__ import annotations

from moba_megatron.generation.streaming import TextStream


def test_pieces_add_up_and_characters_are_whole():
    text = "naïve café — 日本語 🙂!"
    tokens = list(text.encode())
    pieces: list[str] = []
    stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"), pieces.append)
    stream.put(tokens[:4])
    for token in tokens[4:]:
        stream.put([token])
    stream.end()
    assert "".join(pieces) == text and len(pieces) > 10
    assert not any("\ufffd" in piece for piece in pieces)


def test_what_stands_between_tokens_is_kept():
    words = ["in", "the", "beginning"]
    pieces: list[str] = []
    stream = TextStream(lambda ids: " ".join(words[i] for i in ids), pieces.append)
    for token in range(3):
        stream.put([token])
    assert pieces == ["in", " the", " beginning"]


def test_an_unfinished_character_comes_at_the_end():
    pieces: list[str] = []
    stream = TextStream(lambda ids: bytes(ids).decode(errors="replace"), pieces.append)
    stream.put([ord("a"), 0xC3])
    assert pieces == []
    stream.end()
    stream.end()
    assert pieces == ["a\ufffd"]
