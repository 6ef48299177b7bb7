"""Options of `moba-megatron evaluate` for the losses."""

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
        bool | None,
        typer.Option("--losses/--no-losses", help="Compute the losses. Default: if no other evaluation is asked for."),
    ] = None
    losses_choice: Annotated[
        list[str] | None,
        typer.Option(
            help="B:K or B:K:SELECTOR: loss of the same weights under MoBA with block size B and top-k K, in all "
            "layers or in those after @ (B:K@5, B:K:SELECTOR@0-26,29; counted from 0). Also for models with full "
            "attention. May be given several times. Implies --losses."
        ),
    ] = None
    samples: Annotated[int | None, typer.Option(min=1, help="Samples to evaluate. Default: as in training.")] = None
    trailing: Annotated[
        int | None, typer.Option(min=1, help="Positions of the trailing loss, in tokens. Default: as in training.")
    ] = None

    def choices(self) -> list[LossesChoice]:
        """The attentions of `--losses-choice`.

        Raises:
            ValueError: a text is not B:K or B:K:SELECTOR.
        """
        from moba_megatron.evaluation.attention_choice import parse_losses_choice

        return [parse_losses_choice(text) for text in self.losses_choice or []]

    def wanted(self, other: bool) -> bool:
        """Whether the losses are evaluated.

        Args:
            other: whether the user asks for something else.
        """
        return bool(self.losses_choice) or (not other if self.losses is None else self.losses)

    def unused(self) -> list[str]:
        """Options that only the losses use."""
        given = {"--samples": self.samples, "--trailing": self.trailing}
        return [name for name, value in given.items() if value is not None]
