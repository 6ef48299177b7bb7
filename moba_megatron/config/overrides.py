"""`key.path=value` on the command line: the type of the key decides how the value is read.

A key whose type is a string takes the text literally: `run.dir=runs/exp #2`, `2024_11_05`, `007`, `12:30:45`, `true`
and `${x}` are these characters. If the type also allows None, the word `null` means None; if it also allows a list, a
value that begins with `[` is YAML. All other values are YAML, as in a file: numbers, lists, `${other.key}`. Unknown
keys are refused later by the schema.

`???` in a file is a value that the user must give.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel

from moba_megatron.config.checks import ConfigError
from moba_megatron.config.literal import literal

MISSING = "???"


def with_override(tree: dict[str, Any], override: str, schema: type[BaseModel]) -> dict[str, Any]:
    """A tree of plain values with one `key.path=value` applied; references (`${...}`) are not looked up.

    Members of a list are named by their number (`sources.0.path` or `sources[0].path`). A mapping is merged into an
    existing one, key by key; if it names another kind of a union, it replaces it. If only the kind is named, keys that
    the new kind does not have are dropped.

    Raises:
        ConfigError: not of this form, a value that is not YAML, a number outside of a list.
    """
    key, equals, text = override.partition("=")
    parts = key.replace("[", ".").replace("]", "").split(".")
    if not equals or key.startswith("-") or "" in parts:
        raise ConfigError([f"override {override!r} is not of the form key.path=value"])
    allowed, section = [schema], tree
    for depth, part in enumerate(parts):
        place, current = _place(section, part, ".".join(parts[:depth]))
        union = _members(allowed)
        allowed = list(_types_below(allowed, part, section))
        if depth == len(parts) - 1:
            _put(section, place, _value(key, text, allowed), allowed)
            _drop_keys_of_others(section, place, current, union)
        elif not isinstance(current, dict | list):
            section[place] = {}
        section = section[place]
    return tree


def as_override(key: str, value: Any, schema: type[BaseModel]) -> str:
    """The override with the same meaning as this value of a key in a YAML file, also for references (`${...}`)."""
    allowed = types_of(key, schema)
    parent, _, name = key.rpartition(".")
    if isinstance(value, str) and (not _text_alone(allowed) or _stands_for_itself(value, allowed)):
        return f"{key}={value}"
    if _text_alone(allowed) and parent and not (value is None and type(None) in allowed):
        # A string that an override cannot express is given as YAML one level above.
        key, value = parent, {name: value}
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def merged(below: Any, above: Any) -> Any:
    """Merge mappings key by key, at all depths; for other values take the upper one."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    result = dict(below)
    for key, value in above.items():
        # Numbers as keys are numbers in YAML and strings on the command line.
        same = next((other for other in below if str(other) == str(key)), key)
        result[same] = merged(below.get(same), value)
    return result


def resolved(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with every reference (`${...}`) replaced by its value.

    Raises:
        ConfigError: a reference to nothing.
    """
    try:
        return OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise ConfigError([f"{key}: " * bool(key) + str(error).splitlines()[0]]) from error
    except RecursionError as error:
        raise ConfigError(["the configuration is nested too deep, or refers to itself: flatten it"]) from error


def missing_keys(values: Any, prefix: str = "") -> Iterator[str]:
    """Paths of the keys whose value the user must give (`???`)."""
    if isinstance(values, str) and values == MISSING:
        yield prefix
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(values, dict):
        items = values.items()
    elif isinstance(values, list):
        items = enumerate(values)
    for key, value in items:
        yield from missing_keys(value, f"{prefix}.{key}".removeprefix("."))


def refuse_missing(values: Any, needed_later: tuple[str, ...] = ()) -> None:
    """Raise if a value is missing (`???`).

    Args:
        needed_later: keys that may wait.

    Raises:
        ConfigError: with one line for each of the others.
    """
    left = [key for key in missing_keys(values) if key not in needed_later]
    if left:
        raise ConfigError([f"{key} = {MISSING}: give this value, for instance {key}=..." for key in left])


def _place(section: Any, part: str, where: str) -> tuple[Any, Any]:
    """The key or number of a part of a path in a mapping or list, and its current value."""
    if isinstance(section, list):
        if not part.isdecimal() or int(part) >= len(section):
            there = f"0 to {len(section) - 1}" if section else "none, it is empty"
            raise ConfigError([f"{where}.{part}: {where} is a list; its members are {there}"])
        return int(part), section[int(part)]
    place = next((key for key in section if str(key) == part), part)
    return place, section.get(place)


def _put(section: Any, place: Any, value: Any, allowed: list[Any]) -> None:
    current = section[place] if isinstance(section, list) else section.get(place)
    if isinstance(current, dict) and isinstance(value, dict) and not _another_kind(current, value, _members(allowed)):
        value = merged(current, value)
    section[place] = value


def _drop_keys_of_others(section: Any, place: Any, before: Any, union: list[type[BaseModel]]) -> None:
    """If only the kind of a section was changed, remove the keys that the new kind does not have."""
    if not isinstance(section, dict) or place != _kind_key(union) or section[place] == before:
        return
    chosen = [member for member in union if section[place] in _kinds(member, place)]
    known = {name for member in chosen for name in member.model_fields}
    for name in [name for name in section if chosen and name not in known]:
        # Keys that no kind knows are for the schema to refuse.
        if any(name in member.model_fields for member in union):
            del section[name]


def _another_kind(before: dict[str, Any], now: dict[str, Any], union: list[type[BaseModel]]) -> bool:
    kind = _kind_key(union)
    return kind is not None and kind in now and now[kind] != before.get(kind)


def _kind_key(union: list[type[BaseModel]]) -> str | None:
    """The key that distinguishes the members of a union of sections; None for a single section."""
    if len(union) < 2:
        return None
    return next((name for name in union[0].model_fields if all(_kinds(member, name) for member in union)), None)


def _kinds(section: type[BaseModel], key: str) -> tuple[Any, ...]:
    """The values that a key without a default may have."""
    field = section.model_fields.get(key)
    if field is None or not field.is_required() or typing.get_origin(field.annotation) is not typing.Literal:
        return ()
    return typing.get_args(field.annotation)


def types_of(key: str, schema: type[BaseModel]) -> list[Any]:
    """The types that a value of a key may have; none if the schema has no such key."""
    allowed: list[Any] = [schema]
    for part in key.split("."):
        allowed = list(_types_below(allowed, part, {}))
    return allowed


def _types_below(allowed: list[Any], part: str, section: Any) -> Iterator[Any]:
    """The types that a part of a path may have below these types.

    Args:
        section: the current value; in a union of sections its kind decides, if that kind has the part.
    """
    union = _members(allowed)
    kind = _kind_key(union)
    word = section.get(kind) if kind and isinstance(section, dict) else None
    chosen = [member for member in union if kind and word in _kinds(member, kind) and part in member.model_fields]
    for kind_of_value in [*(chosen or union), *(item for item in allowed if item not in union)]:
        origin, arguments = typing.get_origin(kind_of_value), typing.get_args(kind_of_value)
        if isinstance(kind_of_value, type) and issubclass(kind_of_value, BaseModel):
            field = kind_of_value.model_fields.get(part)
            if field is not None:
                yield from _alternatives(field.annotation)
        elif origin is list and part.isdecimal():
            yield from _alternatives(arguments[0])
        elif origin is dict:
            yield from _alternatives(arguments[1])


def _members(allowed: list[Any]) -> list[type[BaseModel]]:
    return [item for item in allowed if isinstance(item, type) and issubclass(item, BaseModel)]


def _alternatives(annotation: Any) -> Iterator[Any]:
    """The types of a union, without annotations."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _alternatives(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for argument in typing.get_args(annotation):
            yield from _alternatives(argument)
    else:
        yield annotation


def _text_alone(allowed: list[Any]) -> bool:
    """Whether a value of these types is a string, or None or a list."""
    return (
        bool(allowed)
        and any(map(_is_text, allowed))
        and all(_is_text(item) or item is type(None) or typing.get_origin(item) is list for item in allowed)
    )


def _stands_for_itself(text: str, allowed: list[Any]) -> bool:
    """Whether a text means the same in an override and in a file, if the key is a string."""
    return text != "" and "${" not in text and not _none(text, allowed) and not _list(text, allowed)


def _none(text: str, allowed: list[Any]) -> bool:
    return text == "null" and type(None) in allowed


def _list(text: str, allowed: list[Any]) -> bool:
    return text.startswith("[") and any(typing.get_origin(item) is list for item in allowed)


def _is_text(item: Any) -> bool:
    words = typing.get_args(item) if typing.get_origin(item) is typing.Literal else ()
    return item is str or (bool(words) and all(isinstance(word, str) for word in words))


def _value(key: str, text: str, allowed: list[Any]) -> Any:
    if not _text_alone(allowed) or _list(text, allowed):
        return _yaml_value(key, text, known=bool(allowed))
    if _none(text, allowed):
        return None
    if text == "":
        none = " (null for none)" if type(None) in allowed else ""
        raise ConfigError([f"override '{key}=' has no value: write one after the equals sign{none}"])
    return literal(text)


def _yaml_value(key: str, text: str, known: bool) -> Any:
    """A value as a file would have it: OmegaConf reads 1e-3 as a number, which YAML 1.1 does not."""
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        if not known:
            return literal(text)
        reason = " ".join(str(error).split())
        raise ConfigError([f"override '{key}={text}': the value is not valid YAML: {reason}"]) from error
