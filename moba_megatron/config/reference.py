"""`docs/configuration.md`, made from the schema: python -m moba_megatron.config.reference > docs/configuration.md"""

from __future__ import annotations

import inspect
import json
import typing
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from moba_megatron.config.parallel import ExchangeConfig
from moba_megatron.config.schema import AttentionStage, BlendEntry, Config, LayerAttentionOverride

HEAD = """# Configuration reference

Made from the schema by `python -m moba_megatron.config.reference`; do not edit. A configuration is a YAML file with
these sections. `base: other.yaml`, or a list of files of which later ones win, is taken over first;
`section.key=value` on the command line wins over all files. There the value of a key whose type is a string is the
text as it stands (`run.dir=runs/exp #2`, `007`, `true`); `key=null` means none where the type allows it,
`'key=[...]'` a list where it allows one. All other values are YAML (`'key=[a,b]'`). Members of lists have numbers
(`data.train.0.weight=2`). `${other.key}` in a file is the value of that key, `???` one that is still to be given. A
base is relative to the file it stands in, all other paths to the working directory; a leading `~` is the home folder.
Sizes are in tokens unless said otherwise.

A name after a file is a part of it: `FILE.yaml:NAME` takes one of the file's `variants:` (sections laid over the
file), and `SWEEP.yaml:RUN` one run of a sweep ([scaling.md](scaling.md)).
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
