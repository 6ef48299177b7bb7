"""What `moba-megatron evaluate` asks of the routing report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

if TYPE_CHECKING:
    from moba_megatron.model.schedule import LayerAttention


@dataclass(frozen=True)
class RoutingFlags:
    """Options of the command line."""

    TITLE: ClassVar[str] = "Routing"

    routing: Annotated[
        bool, typer.Option("--routing", help="What the MoBA layers choose, and how much of full attention it holds.")
    ] = False
    routing_samples: Annotated[int, typer.Option(min=1, help="Validation samples of the routing report.")] = 4
    routing_choice: Annotated[
        str | None,
        typer.Option(help="B:K, in place of the layers' own; also on a model that attends fully. Asks for --routing."),
    ] = None

    @property
    def wanted(self) -> bool:
        """Whether there is a report."""
        return self.routing or self.routing_choice is not None

    def choice(self) -> LayerAttention | None:
        """The attention of `--routing-choice`.

        Raises:
            ValueError: what is none.
        """
        from moba_megatron.evaluation.attention_choice import parse_choice

        return None if self.routing_choice is None else parse_choice("--routing-choice", self.routing_choice)
