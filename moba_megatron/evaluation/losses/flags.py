"""What `moba-megatron evaluate` asks of the losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

if TYPE_CHECKING:
    from moba_megatron.evaluation.attention_choice import LossesChoice


@dataclass(frozen=True)
class LossesFlags:
    """Options of the command line."""

    TITLE: ClassVar[str] = "Losses"

    losses: Annotated[
        bool | None, typer.Option("--losses/--no-losses", help="The losses. Default: if nothing else is asked for.")
    ] = None
    losses_choice: Annotated[
        list[str] | None,
        typer.Option(
            help="B:K, or B:K:SELECTOR: what the same weights lose under MoBA of these sizes in all layers, or only in "
            "some (B:K@5, B:K:SELECTOR@0-26,29; counted from 0); also on a model that attends fully. Several times. "
            "Asks for the losses."
        ),
    ] = None
    samples: Annotated[int | None, typer.Option(min=1, help="Samples to evaluate. Default: as in training.")] = None
    trailing: Annotated[
        int | None, typer.Option(min=1, help="Positions of the trailing loss, in tokens. Default: as in training.")
    ] = None

    def choices(self) -> list[LossesChoice]:
        """The attentions of `--losses-choice`.

        Raises:
            ValueError: what is none.
        """
        from moba_megatron.evaluation.attention_choice import parse_losses_choice

        return [parse_losses_choice(text) for text in self.losses_choice or []]

    def wanted(self, other: bool) -> bool:
        """Whether the losses are evaluated.

        Args:
            other: whether something else is asked for.
        """
        return bool(self.losses_choice) or (not other if self.losses is None else self.losses)

    def unused(self) -> list[str]:
        """Options that say something of the losses only."""
        given = {"--samples": self.samples, "--trailing": self.trailing}
        return [name for name, value in given.items() if value is not None]
