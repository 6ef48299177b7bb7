"""The tasks. Each poses puzzles; `compose` hides them in text.

They ask for a continuation that the text fixes word by word, so a base model can do them without instructions, and
their likelihood means something. After the needle test of the MoBA report (figure 7) and the kinds of tasks of RULER
(arXiv 2404.06654).
"""

from __future__ import annotations

import random

from moba_megatron.evaluation.tasks.sample import Puzzle, Statement, Task, target_text
from moba_megatron.evaluation.tasks.words import NAMES, VALUES

_DISTRACTORS = 3
# One statement and the text around it.
_TOKENS_PER_STATEMENT = 64
_TOKENS_PER_PAIR = 8
_COMMON_SHARE = 0.1


def _statement(name: str, value: str) -> str:
    return f"The number of the {name} is {value}."


def _question(name: str) -> str:
    return f"What is the number of the {name}? The number of the {name} is"


def _others(stream: random.Random, value: str, taken: list[str]) -> list[str]:
    """Wrong targets: those that the text names, then random ones, three in all."""
    wrong = [other for other in taken if other != value]
    wrong += stream.sample([other for other in VALUES if other != value and other not in wrong], _DISTRACTORS)
    return [target_text([other]) for other in wrong[:_DISTRACTORS]]


def _needle(stream: random.Random, length: int, depth: float) -> Puzzle:
    name, value = stream.choice(NAMES), stream.choice(VALUES)
    return Puzzle(
        before="",
        statements=[Statement(_statement(name, value), depth)],
        question=_question(name),
        answers=[value],
        distractors=_others(stream, value, []),
        depth=depth,
    )


def _multi_key(stream: random.Random, length: int, depth: float) -> Puzzle:
    count = max(2, min(16, length // _TOKENS_PER_STATEMENT))
    names, values = stream.sample(NAMES, count), stream.sample(VALUES, count)
    depths = [depth, *(stream.random() for _ in range(count - 1))]
    return Puzzle(
        before="",
        statements=[Statement(_statement(*item), at) for *item, at in zip(names, values, depths, strict=True)],
        question=_question(names[0]),
        answers=[values[0]],
        distractors=_others(stream, values[0], values),
        depth=depth,
    )


def _multi_value(stream: random.Random, length: int, depth: float) -> Puzzle:
    count = max(2, min(4, length // _TOKENS_PER_STATEMENT))
    name, values = stream.choice(NAMES), stream.sample(VALUES, count)
    depths = sorted(stream.random() for _ in range(count))
    wrong = (stream.sample(VALUES, count) for _ in range(_DISTRACTORS))
    return Puzzle(
        before="",
        statements=[
            Statement(f"A number of the {name} is {value}.", at) for value, at in zip(values, depths, strict=True)
        ],
        question=f"All numbers of the {name}, in the order of the text, are",
        answers=values,
        distractors=[target_text(other) for other in wrong if other != values],
    )


def _variable_tracking(stream: random.Random, length: int, depth: float) -> Puzzle:
    """Two chains of assignments, `owl = 482`, `fox = owl`, ...; asked is the value at the end of one."""
    hops = max(1, min(4, length // (2 * _TOKENS_PER_STATEMENT)))
    names, values = stream.sample(NAMES, 2 * (hops + 1)), stream.sample(VALUES, 2)
    statements = []
    for chain, value in zip((names[: hops + 1], names[hops + 1 :]), values, strict=True):
        depths = sorted(stream.random() for _ in chain)
        for name, said, at in zip(chain, [value, *chain[:-1]], depths, strict=True):
            statements.append(Statement(f"Let {name} = {said}.", at))
    return Puzzle(
        before="",
        statements=statements,
        question=f"The value of {names[hops]} is",
        answers=[values[0]],
        distractors=_others(stream, values[0], values),
    )


def _associative_recall(stream: random.Random, length: int, depth: float) -> Puzzle:
    """Pairs of a name and a number all over the text; asked is the number of one name."""
    count = max(2, min(len(NAMES), length // (2 * _TOKENS_PER_PAIR)))
    names, values = stream.sample(NAMES, count), stream.sample(VALUES, count)
    depths = [depth, *(stream.random() for _ in range(count - 1))]
    return Puzzle(
        before="",
        statements=[Statement(f"{name} {value};", at) for name, value, at in zip(names, values, depths, strict=True)],
        question=names[0],
        answers=[values[0]],
        distractors=_others(stream, values[0], values),
        depth=depth,
    )


def _common_words(stream: random.Random, length: int, depth: float) -> Puzzle:
    answers = sorted(stream.sample(NAMES, 3))
    wrong = (sorted(stream.sample([n for n in NAMES if n not in answers], 3)) for _ in range(_DISTRACTORS))
    return Puzzle(
        before="A list of words:",
        statements=[],
        question=".\nThe three most common words of the list, from A to Z, are",
        answers=answers,
        distractors=[target_text(other) for other in wrong],
    )


def _list_of_common(stream: random.Random, count: int, puzzle: Puzzle) -> list[str]:
    """Each answer a tenth of the list; the others take turns."""
    each = max(2, int(count * _COMMON_SHARE))
    rare = [name for name in NAMES if name not in puzzle.answers]
    stream.shuffle(rare)
    rest = max(0, count - each * len(puzzle.answers))
    words = puzzle.answers * each + [rare[i % len(rare)] for i in range(rest)]
    stream.shuffle(words)
    return [f" {word}" for word in words]


def _frequent_words(stream: random.Random, length: int, depth: float) -> Puzzle:
    answers = stream.sample(NAMES, 3)
    wrong = (stream.sample([n for n in NAMES if n not in answers], 3) for _ in range(_DISTRACTORS))
    return Puzzle(
        before="A list of words:",
        statements=[],
        question=".\nThe three most frequent words of the list, the most frequent one first, are",
        answers=answers,
        distractors=[target_text(other) for other in wrong],
    )


def _list_of_frequent(stream: random.Random, count: int, puzzle: Puzzle) -> list[str]:
    """The word of rank r comes about 1/r as often as the first (Zipf's law, as in natural text), and the answers, which
    rank first, differ in how often they come."""
    rare = [name for name in NAMES if name not in puzzle.answers]
    stream.shuffle(rare)
    ranked = puzzle.answers + rare
    total = sum(1 / rank for rank in range(1, len(ranked) + 1))
    counts = [int(count / total / rank) for rank in range(1, len(ranked) + 1)]
    for place in reversed(range(len(puzzle.answers))):
        counts[place] = max(counts[place], counts[place + 1] + 1)
    words = [word for word, times in zip(ranked, counts, strict=True) for _ in range(times)]
    stream.shuffle(words)
    return [f" {word}" for word in words]


TASKS: dict[str, Task] = {
    "needle": Task("one statement of a name and its number", True, _needle),
    "multi_key": Task("the number of one of several names", True, _multi_key),
    "multi_value": Task("all numbers of one name, in order", False, _multi_value),
    "variable_tracking": Task("the value at the end of a chain of assignments", False, _variable_tracking),
    "associative_recall": Task("the number of one of many names", True, _associative_recall),
    "common_words": Task("the words that a list repeats most", False, _common_words, _list_of_common),
    "frequent_words": Task("the most frequent words of a list, in order", False, _frequent_words, _list_of_frequent),
}
