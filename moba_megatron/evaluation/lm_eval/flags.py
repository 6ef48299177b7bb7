"""Options of `moba-megatron evaluate` for EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

if TYPE_CHECKING:
    from moba_megatron.evaluation.lm_eval.run import HarnessSettings


@dataclass(frozen=True)
class HarnessFlags:
    """Options of the command line."""

    TITLE: ClassVar[str] = "lm-evaluation-harness"

    lm_eval: Annotated[
        str | None,
        typer.Option(
            help="Tasks of EleutherAI's lm-evaluation-harness, by commas; also on a Hugging Face folder. The model "
            "attends as it was trained; --attention full or both for full attention of the same weights."
        ),
    ] = None
    lm_eval_tasks: Annotated[Path | None, typer.Option(help="Folder with your own task files.")] = None
    lm_eval_limit: Annotated[int | None, typer.Option(min=1, help="Samples of each task. Default: all.")] = None
    lm_eval_batch: Annotated[int, typer.Option(min=1, help="Batch size of the harness.")] = 1
    lm_eval_chat: Annotated[
        bool,
        typer.Option("--lm-eval-chat", help="Use the tokenizer's chat template, with earlier examples as turns."),
    ] = False
    lm_eval_system: Annotated[
        str | None, typer.Option(help="System message of --lm-eval-chat, for templates that take one.")
    ] = None
    ruler: Annotated[
        str | None,
        typer.Option(help="Lengths (4K,8K,...) of a RULER-style task set, drawn here and run by lm-eval."),
    ] = None
    ruler_samples: Annotated[int, typer.Option(min=1, help="Samples of each of its tasks at each length.")] = 20

    @property
    def wanted(self) -> bool:
        """Whether the harness runs, or an option would be of no use without it."""
        asked = (self.lm_eval, self.ruler, self.lm_eval_tasks, self.lm_eval_limit, self.lm_eval_system)
        return self.lm_eval_chat or any(option is not None for option in asked)

    def settings(self, haystack: str | None) -> HarnessSettings:
        """What to run.

        Raises:
            ValueError: options that need others, or what is not a length.
        """
        from moba_megatron.evaluation.lm_eval.run import harness_settings

        return harness_settings(
            self.lm_eval,
            self.lm_eval_tasks,
            limit=self.lm_eval_limit,
            batch_size=self.lm_eval_batch,
            ruler=self.ruler,
            samples=self.ruler_samples,
            haystack=haystack,
            chat=self.lm_eval_chat,
            system=self.lm_eval_system,
        )
