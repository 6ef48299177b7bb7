"""What every section of the configuration has in common: it is strict, documented below its fields, and knows which of
them are paths."""

from __future__ import annotations

import os
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

PATHS = (
    *("dir", "path", "base", "train", "validation", "tokenizer", "index_cache", "init_from", "resume", "start_from"),
    "data_files",
)
"""Names of the keys that are paths, some of them in some sections only: a leading `~` is the home folder."""


class Section(BaseModel):
    """A part of the schema: unknown keys and wrong types are errors, the docstring below a field is its
    documentation."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, protected_namespaces=())

    @field_validator(*PATHS, check_fields=False)
    @classmethod
    def _with_home(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [cls._with_home(item) for item in value]
        return os.path.expanduser(value) if isinstance(value, str) else value
