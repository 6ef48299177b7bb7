"""What a synthetic task is made of."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

# Between several answers of one sample, in the order in which the text gives them.
BETWEEN_ANSWERS = ", "


class TaskTokenizer(Protocol):
    """What tasks ask of a tokenizer; `moba_megatron.corpus.tokenizer.Tokenizer` is one."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without any template."""


@dataclass(frozen=True)
class Sample:
    """A prompt and what must follow it.

    Attributes:
        task: name of the task.
        prompt: text without white space at its end.
        answers: what must be found, in the order of the text; all of them count.
        length: tokens of `prompt` and `target` together.
        depth: where the decisive statement lies, 0 at the start and 1 at the end of the haystack; None where several
            places decide.
        distractors: targets of the same form that are wrong.
    """

    task: str
    prompt: str
    answers: list[str]
    length: int
    depth: float | None
    distractors: list[str] = field(default_factory=list)

    @property
    def target(self) -> str:
        """The continuation of the prompt that holds all answers."""
        return target_text(self.answers)


@dataclass(frozen=True)
class Statement:
    """A sentence to be hidden in the haystack at `depth` (0 to 1)."""

    text: str
    depth: float


@dataclass(frozen=True)
class Puzzle:
    """A sample before its haystack: what is hidden, the question, and what answers it.

    Attributes:
        before: the first sentence of the prompt, or an empty string.
        question: the end of the prompt.
        depth: see `Sample`.
    """

    before: str
    statements: list[Statement]
    question: str
    answers: list[str]
    distractors: list[str]
    depth: float | None = None


@dataclass(frozen=True)
class Task:
    """A kind of sample.

    Attributes:
        summary: what it asks for, in a line.
        has_depth: whether one statement decides, which can be put at a chosen depth.
        pose: draws a puzzle. Its arguments: the random stream, the length in tokens that it is for, and the depth of
            the decisive statement.
        words: draws the text in which statements hide, `count` words of it; None: a haystack.
    """

    summary: str
    has_depth: bool
    pose: Callable[[random.Random, int, float], Puzzle]
    words: Callable[[random.Random, int, Puzzle], list[str]] | None = None


def target_text(answers: list[str]) -> str:
    """The continuation of a prompt that gives these answers.

    >>> target_text(["482", "117"])
    ' 482, 117'
    """
    return " " + BETWEEN_ANSWERS.join(answers)
