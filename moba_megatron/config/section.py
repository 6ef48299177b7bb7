"""What every section of the configuration has in common: it is strict, and documented below its fields."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the schema: unknown keys and wrong types are errors, the docstring below a field is its
    documentation."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, protected_namespaces=())
