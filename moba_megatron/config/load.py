"""Reading a configuration: defaults, then the file named by `base:`, then the file itself, then `key.path=value`
overrides.

`base:` is a path relative to the file that names it, or a list of them, later ones winning. `variants:` holds changes
of the file by name, and `FILE.yaml:NAME` is the file with those of one; they hold only for the file itself, not when it
is a base of another. The type of a key decides how the text of an override is read (`overrides`). Unknown keys, wrong
types and combinations that cannot work end as one `ConfigError` that lists every problem with its key, its value and
the fix.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moba_megatron.config.checks import ConfigError, combination_problems
from moba_megatron.config.overrides import merged, refuse_missing, resolved, types_of, with_override
from moba_megatron.config.pretrained import with_pretrained_model
from moba_megatron.config.reading import read_tree
from moba_megatron.config.schema import Config
from moba_megatron.config.section import Section

NEEDED_BY_TRAINING = ("model.init_from",)


def config_from_tree(tree: dict[str, Any], overrides: list[str] | None = None) -> Config:
    """A checked configuration from the result of `read_yaml` or from plain values."""
    for override in overrides or []:
        tree = _with_both_exchanges(with_override(tree, override, Config))
    return config_from_dict(resolved(tree))


def config_from_dict(values: dict[str, Any]) -> Config:
    """A checked `Config` from plain values, as `load_config` makes it from files.

    `model.init_from`, if set, gives the keys that the `model` section leaves out. It may still be missing (`???`): only
    a training needs it.

    Raises:
        ConfigError: with one line for each unknown key, wrong type, value still to be given or impossible combination.
    """
    refuse_missing(values, needed_later=NEEDED_BY_TRAINING)
    values = with_pretrained_model(values)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError([explain(item, Config) for item in error.errors()]) from error
    problems = [*combination_problems(config), *_unknown_names(config)]
    if problems:
        raise ConfigError(problems)
    return config


def split_name(path: str | Path) -> tuple[Path, str | None]:
    """A file and the name of a part of it; None for the whole file.

    >>> split_name("a/b.yaml:256gpus"), split_name("a/b.yaml")
    ((PosixPath('a/b.yaml'), '256gpus'), (PosixPath('a/b.yaml'), None))
    """
    path = Path(path).expanduser()
    found = re.fullmatch(r"(?P<file>.+\.ya?ml):(?P<name>[^/]+)", str(path))
    return (Path(found["file"]), found["name"]) if found and not path.exists() else (path, None)


def read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a file (`FILE.yaml` or `FILE.yaml:VARIANT`) and of its bases, unchecked, references (`${...}`)
    unresolved."""
    path, variant = split_name(path)
    path = path.resolve()
    if path in seen:
        raise ConfigError([f"base: {path} includes itself"])
    return with_bases(path, variant, read_mapping(path), seen)


def read_mapping(path: Path) -> dict[str, Any]:
    """The values of one file, without those of its bases."""
    if not path.is_file():
        raise ConfigError([f"no such configuration file: {path}"])
    tree = read_tree(path)
    if not isinstance(tree, dict):
        raise ConfigError([f"{path} must hold a mapping of sections"])
    return tree


def with_bases(path: Path, variant: str | None, tree: dict[str, Any], seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a file and of one of its variants, laid over those of its bases.

    Args:
        path: absolute path of the file.
        tree: the result of `read_mapping`.
        seen: the files that have it as a base.
    """
    variants = tree.pop("variants", {})
    chosen = {} if variant is None else _variant(path, variants, variant)
    values = read_bases(path, tree.pop("base", []), seen)
    return merged(merged(values, _with_both_exchanges(tree)), _with_both_exchanges(chosen))


def read_bases(path: Path, bases: Any, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of the files in the `base:` of a file, later ones winning."""
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, Sequence) or not all(isinstance(base, str) and "\0" not in base for base in bases):
        raise ConfigError([f"{path}: base = {bases!r} must be a path or a list of paths"])
    values: dict[str, Any] = {}
    for base in bases:
        values = merged(values, read_yaml(path.parent / Path(base).expanduser(), (*seen, path)))
    return values


def _variant(path: Path, variants: Any, name: str) -> dict[str, Any]:
    """The changes that a file calls by a name."""
    if not isinstance(variants, dict) or not all(isinstance(changes, dict) for changes in variants.values()):
        raise ConfigError([f"{path}: variants must hold a mapping of sections for each name"])
    if name not in variants:
        there = ", ".join(map(str, variants)) or "none"
        raise ConfigError([f"{path} has no variant {name!r}; its variants: {there}"])
    return variants[name]


def _unknown_names(config: Config) -> list[str]:
    """Names of `checkpoint.allow_changed` that are not keys and would have no effect."""
    return [
        f"checkpoint.allow_changed: {name!r} is neither a key nor a section{_near(name.split('.'), Config)}"
        for name in config.checkpoint.allow_changed
        if not types_of(name, Config)
    ]


def _with_both_exchanges(tree: dict[str, Any]) -> dict[str, Any]:
    """Write one word for both kinds of layers as two keys, so that a later file may change one of them."""
    for section in (tree.get("parallel"), tree):
        if isinstance(section, dict) and isinstance(word := section.get("exchange"), str):
            section["exchange"] = {"moba": word, "full": word}
    return tree


def explain(error: Any, schema: type[Section]) -> str:
    """One pydantic error as `key = value: what is wrong`, with the closest name of the schema for a misspelt key."""
    location = [str(part) for part in error["loc"] if part not in ("str", "list[BlendEntry]")]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key{_near(location, schema)}"
    if error["type"] == "missing":
        return f"{key}: missing, and it has no default"
    if error["type"] == "value_error":
        return f"{key} = {shortened(error['input'])}: {error['ctx']['error']}"
    return f"{key} = {shortened(error['input'])}: {error['msg'][0].lower()}{error['msg'][1:]}"


def shortened(value: Any) -> str:
    """A value as Python writes it, cut to 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _near(location: list[str], schema: type[Section]) -> str:
    """The name of the schema that is closest to an unknown one, as a question."""
    near = difflib.get_close_matches(location[-1], _known_keys(schema, location[:-1]), n=1, cutoff=0.5)
    return f"; did you mean {'.'.join([*location[:-1], near[0]])}?" if near else ""


def _known_keys(schema: type[Section], location: list[str]) -> list[str]:
    section: Any = schema
    for name in location:
        field = getattr(section, "model_fields", {}).get(name)
        section = field.annotation if field else None
    return list(getattr(section, "model_fields", {}))
