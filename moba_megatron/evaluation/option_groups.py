"""Options of a command in groups: each part of `evaluate` has a dataclass with its own options."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Annotated, Any, ClassVar, Protocol, get_args, get_type_hints


class Flags(Protocol):
    """A dataclass whose fields are options of a command: `name: Annotated[type, typer.Option(...)] = default`."""

    TITLE: ClassVar[str]
    """Above these options in `--help`."""
    __dataclass_fields__: ClassVar[dict[str, Any]]


def with_flags(**groups: type[Flags]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a typer command the options of dataclasses. Its parameters of these names get an instance of each.

    Args:
        groups: the dataclass for each of these parameters of the command.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def called(**given: Any) -> None:
            made = {name: kind(**{field.name: given.pop(field.name) for field in fields(kind)})
                    for name, kind in groups.items()}  # fmt: skip
            command(**given, **made)

        # Hints of the command alone: those of a group's parameter are no options.
        hints = get_type_hints(command, include_extras=True)
        own = [
            parameter.replace(annotation=hints[name])
            for name, parameter in inspect.signature(command).parameters.items()
            if name not in groups
        ]
        added = [option for kind in groups.values() for option in _options(kind)]
        parameters = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            else parameter
            for parameter in [*own, *added]
        ]
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return called

    return decorate


def _options(kind: type[Flags]) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    found = []
    for field in fields(kind):
        type_, option = get_args(hints[field.name])
        option = copy.copy(option)
        option.rich_help_panel = kind.TITLE
        assert field.default is not MISSING, f"{kind.__name__}.{field.name} needs a default"
        found.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=Annotated[type_, option]
            )
        )
    return found
