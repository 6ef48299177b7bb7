"""Options of `moba-megatron evaluate` for the routing report."""

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
        bool,
        typer.Option(
            "--routing", help="Which blocks the MoBA layers choose, and their share of full attention's mass."
        ),
    ] = False
    routing_samples: Annotated[int, typer.Option(min=1, help="Validation samples of the routing report.")] = 4
    routing_choice: Annotated[
        str | None,
        typer.Option(
            help="B:K instead of the layers' own sizes. Also for models with full attention. Implies --routing."
        ),
    ] = None
    suggest_budget: Annotated[
        float | None,
        typer.Option(
            help="With --routing: print the smallest K of each key head whose blocks hold this share of full "
            "attention's mass, such as 0.9, as YAML for attention.layers. The own block counts. The share is a mean "
            "over sampled queries with more past blocks than the layer chooses now."
        ),
    ] = None

    @property
    def wanted(self) -> bool:
        """Whether there is a report."""
        return self.routing or self.routing_choice is not None

    def budget(self) -> float | None:
        """The share of `--suggest-budget`.

        Raises:
            ValueError: the number is not a share, or there is no report.
        """
        share = self.suggest_budget
        if share is None:
            return None
        if not 0 < share <= 1:
            raise ValueError(
                f"--suggest-budget {share:g}: a share of attention's mass above 0 and up to 1, such as 0.9"
            )
        if not self.wanted:
            raise ValueError(f"--suggest-budget {share:g} without --routing, whose samples it needs: add --routing")
        return share

    def choice(self) -> LayerAttention | None:
        """The attention of `--routing-choice`.

        Raises:
            ValueError: the text is not B:K or B:K:SELECTOR.
        """
        from moba_megatron.evaluation.attention_choice import parse_choice

        return None if self.routing_choice is None else parse_choice("--routing-choice", self.routing_choice)
