"""Numbers of tokens as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "K": 2**10, "M": 2**20}


def parse_length(option: str, text: str) -> int:
    """A number of tokens from text such as `4096`, `128K` or `1M`.

    Args:
        option: where the text was given, for the message.

    Raises:
        ValueError: another text.

    >>> parse_length("--length", "128K")
    131072
    """
    match = re.fullmatch(r"([1-9]\d*)([KM]?)", text)
    if not match:
        raise ValueError(f"{option}: {text!r} is not a number of tokens such as 4096 or 32K")
    return int(match[1]) * _UNITS[match[2]]
