"""Conversations in rows: messages, tools and arguments, as values or as JSON; contents, also in parts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from moba_megatron.corpus.chat_options import TAKEN

NO_MESSAGES = "not a list of messages with role and content"
_TEXT_PARTS = ("text", "input_text", "output_text")


def message_list(value: Any) -> list:
    """A list of messages, as it is or as JSON, all of it or each of them.

    Raises:
        ValueError: it is something else.
    """
    value = _parsed(value)
    if not isinstance(value, list):
        raise ValueError(NO_MESSAGES)
    return [_parsed(message) for message in value]


def tool_list(value: Any) -> list:
    """A list of tools, likewise; a single schema is a list of one, and None an empty list."""
    value = _parsed(value)
    value = [value] if isinstance(value, dict) else value
    if value is not None and not isinstance(value, list):
        raise ValueError(f"tools is {type(value).__name__}, not a list")
    return [_parsed(tool) for tool in value or []]


def arguments_of(value: Any) -> dict[str, Any]:
    value = _parsed(value)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"chat_template_kwargs is {type(value).__name__}, not a mapping")
    taken = sorted(TAKEN & (value or {}).keys())
    if taken:
        raise ValueError(f"chat_template_kwargs names {', '.join(taken)}, which `prepare` passes to the template")
    return value or {}


def _parsed(value: Any) -> Any:
    """Some sets keep nested values as JSON, since tables want one type for all rows."""
    if not isinstance(value, str | bytes):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error


def is_text(parts: list) -> bool:
    return all(
        isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
        for part in parts
    )


def joined_text(parts: list) -> str:
    """Content in parts as one text.

    Raises:
        ValueError: a part that is not a text.
    """
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        text = part.get("text") if isinstance(part, dict) and kind in _TEXT_PARTS else part
        if not isinstance(text, str):
            raise ValueError(f"content has a part of type {kind}: only texts are supported")
        texts.append(text)
    return "\n".join(texts)


def texts_in(value: Any) -> Iterator[str]:
    """All texts in a nested value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from texts_in(key)
            yield from texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_in(inner)
