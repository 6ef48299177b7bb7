"""`docs/configuration.md`, made from the schema: python -m moba_megatron.config.reference > docs/configuration.md"""

from __future__ import annotations

import inspect
import json
import typing
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from moba_megatron.config.attention import AttentionStage, LayerAttentionOverride
from moba_megatron.config.parallel import ExchangeConfig
from moba_megatron.config.schema import BlendEntry, Config

HEAD = """# Configuration reference

Made from the schema by `python -m moba_megatron.config.reference`; do not edit. A configuration is a YAML file with
these sections. `base: other.yaml` names a file to start from, or a list of files, later ones winning; the file itself
wins over them. `section.key=value` on the command line wins over all files. There a string is taken literally
(`run.dir=runs/exp #2`, `007`, `true`). `key=null` means none, and `'key=[...]'` a list, if the type allows them. All
other values are YAML (`'key=[a,b]'`). Items of lists have numbers (`data.train.0.weight=2`). In a file `${other.key}`
is the value of another key, and `???` a value that the user must give. A base is relative to its own file, all other
paths to the working directory; a leading `~` is the home folder. Sizes are in tokens unless said otherwise.

A name after a file selects a part of it: `FILE.yaml:NAME` is the file with the changes of one of its `variants:`, and
`SWEEP.yaml:RUN` one run of a sweep ([scaling.md](scaling.md)).
"""


def reference() -> str:
    """The reference as Markdown: one table a section."""
    parts = [HEAD]
    for name, field in Config.model_fields.items():
        parts.append(_section(name, field.annotation))
    parts += [
        _section("attention.stages[]", AttentionStage),
        _section("attention.layers.N", LayerAttentionOverride),
        _section("data.train[]", BlendEntry),
        _section("parallel.exchange", ExchangeConfig),
    ]
    return "\n".join(parts)


def _section(name: str, section: type[BaseModel]) -> str:
    own = "__doc__" in vars(section) and section.__doc__
    lines = [f"## `{name}`", ""]
    if own:
        lines += [inspect.cleandoc(own).replace("\n", " "), ""]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in section.model_fields.items():
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        bounds = ", ".join(bound for item in field.metadata if (bound := _bound(item)))
        kind = _type_name(field.annotation) + (f" ({bounds})" if bounds else "")
        lines.append(f"| `{key}` | {kind} | {_default(field.default)} | {meaning} |")
    return "\n".join(lines) + "\n"


def _bound(item: Any) -> str | None:
    symbols = {"ge": "\u2265", "gt": ">", "le": "\u2264", "lt": "<"}
    return next((f"{symbol} {getattr(item, name)}" for name, symbol in symbols.items() if hasattr(item, name)), None)


def _type_name(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(args[0])
    if origin is typing.Literal:
        return " \\| ".join(f"`{value}`" for value in args)
    if origin in (list, dict):
        return f"{origin.__name__} of {', '.join(_type_name(arg) for arg in args)}"
    if args:
        return " or ".join("none" if arg is type(None) else _type_name(arg) for arg in args)
    return annotation.__name__


def _default(value: Any) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return "required" if value is PydanticUndefined else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    print(reference(), end="")
