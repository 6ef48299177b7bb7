"""Literal `${` in text: without an escape OmegaConf would read it as a reference to another key."""

from __future__ import annotations

import re
from typing import Any


def literal(value: Any) -> Any:
    """A nested value with every `${` in its strings escaped, so that resolving references returns it unchanged.

    >>> print(literal({"dir": "runs/${x}"}))
    {'dir': 'runs/\\\\${x}'}
    """
    if isinstance(value, dict):
        return {key: literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [literal(item) for item in value]
    if isinstance(value, str):
        # Backslashes count only before `${`, where each stands for itself when doubled.
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    return value
