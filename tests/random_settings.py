"""Configurations drawn from the schema: a small run with some of its keys set to something else."""

from __future__ import annotations

import random
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from moba_megatron.config import Config

# What keeps a run small, or starts other programs; other values of these would only take time.
KEPT = {"run.dir", "data.train", "data.validation", "data.tokenizer", "logging.profile_steps", "training.steps"}
INTEGERS = (*range(1, 9), 12, 16, 24, 32, 48, 64, 96, 128)
WRONG_INTEGERS = (0, -1, -(2**70), 10**12, 10**18, 2**63, 2**200)
FLOATS = (0.0, 1e-8, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0, 2.0, 100.0)
WRONG_FLOATS = (-1.0, float("nan"), float("inf"), float("-inf"), 1e308)
STRANGE = (None, "", "text", "???", "${nothing.there}", True, [], [1, "a"], {}, {"a": 1}, 1.5, 10**30, "a\0b", "\ud800")


def keys() -> Iterator[tuple[str, Any]]:
    """Every key of the configuration with its type."""
    for section, field in Config.model_fields.items():
        for name, own in field.annotation.model_fields.items():
            if f"{section}.{name}" not in KEPT:
                yield f"{section}.{name}", own.annotation


def value_of(kind: Any, draw: random.Random) -> Any:
    """A value of a type, mostly one that may be right."""
    if draw.random() < 0.08:
        return draw.choice(STRANGE)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return value_of(arguments[0], draw)
    if origin in (typing.Union, types.UnionType):
        return value_of(draw.choice(arguments), draw)
    if origin is typing.Literal:
        # What is offline starts wandb's own process.
        return draw.choice([word for word in arguments if word != "offline"] + ["typo"])
    if origin is list:
        return [value_of(arguments[0], draw) for _ in range(draw.randrange(4))]
    if origin is dict:
        return {draw.choice(INTEGERS): value_of(arguments[1], draw) for _ in range(draw.randrange(2))}
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        names = draw.sample(list(kind.model_fields), min(2, len(kind.model_fields)))
        return {name: value_of(kind.model_fields[name].annotation, draw) for name in names}
    if kind is bool:
        return draw.random() < 0.5
    if kind is int:
        return draw.choice(INTEGERS if draw.random() < 0.9 else WRONG_INTEGERS)
    if kind is float:
        return draw.choice(FLOATS if draw.random() < 0.9 else WRONG_FLOATS)
    return None if kind is type(None) else draw.choice(["auto", "never", "none", "runs/x", ""])


def changed_values(values: dict[str, Any], draw: random.Random) -> list[str]:
    """Set one to three keys of configuration values to something else, in place; returns which."""
    changed = draw.sample(list(keys()), draw.choice((1, 1, 2, 3)))
    for key, kind in changed:
        section, name = key.split(".")
        values.setdefault(section, {})[name] = value_of(kind, draw)
    return [key for key, _ in changed]
