"""Blends: several datasets read in given shares.

`data.train` and `data.validation` name a dataset by its prefix, a list of prefixes with weights, or a blend file that
`moba-megatron prepare blend` wrote:

    entries:
    - {path: stdlib-short, weight: 0.3}
    - {path: stdlib-long, weight: 0.7}

Paths in a blend file are relative to the folder of the file.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from moba_megatron.config import BlendEntry, ConfigError, Section
from moba_megatron.config.load import explain
from moba_megatron.config.overrides import refuse_missing, resolved
from moba_megatron.config.reading import read_tree

BLEND_FILE = "blend.yaml"
_ENDINGS = (".yaml", ".yml")


class BlendFile(Section):
    """Contents of a blend file."""

    entries: list[BlendEntry] = Field(min_length=1)


def blend_entries(value: str | list[BlendEntry] | None) -> list[BlendEntry]:
    """The datasets that a setting names, with their weights.

    Args:
        value: a prefix, the path of a blend file (it ends in .yaml or .yml), a list of entries, or None. A blend file
            may stand in a list too; its own weights then divide the weight of its entry.

    Raises:
        ConfigError: an empty blend, or a blend file that is missing or holds something else.
    """
    if value is None:
        return []
    if isinstance(value, list):
        if not value:
            raise ConfigError(["the blend is empty: give at least one entry with `path` and `weight`"])
        return [found for entry in value for found in _scaled(blend_entries(entry.path), entry.weight)]
    return _read_blend(Path(value)) if value.endswith(_ENDINGS) else [BlendEntry(path=value)]


def _scaled(entries: list[BlendEntry], weight: float) -> list[BlendEntry]:
    """The same entries with weights that add up to `weight`."""
    total = sum(entry.weight for entry in entries)
    return [BlendEntry(path=entry.path, weight=entry.weight * weight / total) for entry in entries]


def _read_blend(path: Path) -> list[BlendEntry]:
    if not path.is_file():
        raise ConfigError([f"no such blend file: {path}; make one with `moba-megatron prepare blend`"])
    what = f"{path} is not a blend file, which holds `entries`, a list of `path` and `weight`"
    try:
        values = resolved(read_tree(path))
    except ConfigError as error:
        raise ConfigError([f"{what}: {error.problems[0]}"]) from error
    refuse_missing(values)
    try:
        found = BlendFile.model_validate(values)
    except ValidationError as error:
        raise ConfigError([f"{what}: {explain(error.errors()[0], BlendFile)}"]) from error
    return [BlendEntry(path=str(path.parent / entry.path), weight=entry.weight) for entry in found.entries]
