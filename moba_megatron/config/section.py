"""The base of every section of the configuration: it is strict, documents each field below it, and marks the paths."""

from __future__ import annotations

import os
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

PATHS = (
    *("dir", "path", "base", "train", "validation", "tokenizer", "index_cache", "init_from", "resume", "start_from"),
    "data_files",
)
"""Names of the keys that are paths, some of them in some sections only: a leading `~` is the home folder."""


MOST_STEPS = 10**9
MOST_LAYERS = 4096
MOST_RANKS = 2**20
LONGEST = 2**30
"""Tokens. These four are no limits of what can be trained, but of what can be meant: a number beyond them is a mistake
that would fill the memory, or keep a loop busy for years."""
_WORD = 2**63


class Section(BaseModel):
    """A part of the schema: unknown keys and wrong types are errors, the docstring below a field is its
    documentation."""

    model_config = ConfigDict(
        extra="forbid", strict=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _fits_a_word(cls, value: Any) -> Any:
        if isinstance(value, int) and not -_WORD <= value < _WORD:
            raise ValueError("the number does not fit 64 bits")
        return value

    @field_validator(*PATHS, check_fields=False)
    @classmethod
    def _with_home(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [cls._with_home(item) for item in value]
        if not isinstance(value, str):
            return value
        if not value.strip():
            raise ValueError("an empty path: name a file or a folder")
        if "\0" in value:
            raise ValueError("a path cannot contain the NUL character")
        return os.path.expanduser(value)
