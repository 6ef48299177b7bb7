"""Samples of an exact length: a puzzle, and as much text around it as fits."""

from __future__ import annotations

import random
from collections.abc import Callable

from moba_megatron.evaluation.tasks.haystack import Haystack
from moba_megatron.evaluation.tasks.puzzles import TASKS
from moba_megatron.evaluation.tasks.sample import Puzzle, Sample, TaskTokenizer, target_text

_ENDS_OF_SENTENCES = (".", "!", "?", ";", ":", "}", ")", '"')
_LOOK_FOR_END = 24
_PROBE_WORDS = 256


def make_samples(
    name: str,
    *,
    tokenizer: TaskTokenizer,
    length: int,
    count: int,
    seed: int,
    haystack: Haystack | None = None,
    depth: float | None = None,
) -> list[Sample]:
    """Draw samples of a task. The same arguments give the same samples.

    Args:
        name: one of `TASKS`.
        tokenizer: counts tokens.
        length: tokens of prompt and answers together: at most so many, and as near to it as whole words allow.
        count: number of samples.
        seed: of all that is random.
        haystack: the text in which statements hide; None: noise sentences.
        depth: where the statement with the answer stands, 0 (start) to 1 (end); None: anywhere, drawn for each sample.

    Raises:
        ValueError: an unknown task, a depth out of range or for a task that has none, or a length in which not even
            the statements and the question fit.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: there are {', '.join(TASKS)}")
    if depth is not None and not TASKS[name].has_depth:
        raise ValueError(f"task {name} has no depth, because several places decide; leave depth = {depth} out")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth {depth} is not in 0 (start) to 1 (end of the text)")
    if count < 1:
        raise ValueError(f"{count} samples: ask for at least one")
    haystack = haystack or Haystack()
    keys = [f"{seed} {name} {length} {depth} {number}" for number in range(count)]
    return [_make(name, tokenizer, length, haystack, depth, key) for key in keys]


def _make(
    name: str, tokenizer: TaskTokenizer, length: int, haystack: Haystack, depth: float | None, key: str
) -> Sample:
    task, stream = TASKS[name], random.Random(key)
    puzzle = task.pose(stream, length, stream.random() if depth is None else depth)
    target = target_text(puzzle.answers)

    def prompt_of(words: int) -> str:
        # A stream of its own, made anew: more words continue the same text.
        filler = random.Random(f"{key} text")
        drawn = task.words(filler, words, puzzle) if task.words else haystack.draw(filler, words)
        return _hide(puzzle, drawn)

    def tokens_of(prompt: str) -> int:
        return sum(len(ids) for ids in tokenizer.encode_batch([prompt, target]))

    prompt, tokens = _fill(prompt_of, tokens_of, length)
    if prompt is None:
        raise ValueError(f"task {name} does not fit into {length} tokens: without any text around it takes {tokens}")
    return Sample(name, prompt, puzzle.answers, tokens, puzzle.depth, puzzle.distractors)


def _fill(prompt_of: Callable[[int], str], tokens_of: Callable[[str], int], length: int) -> tuple[str | None, int]:
    """The prompt with the most words whose tokens are at most `length`, and its tokens; None where none is."""
    best, tokens = prompt_of(0), tokens_of(prompt_of(0))
    if tokens > length:
        return None, tokens
    probe = max(1e-3, (tokens_of(prompt_of(_PROBE_WORDS)) - tokens) / _PROBE_WORDS)
    low, high = 0, None
    while high is None or high - low > 1:
        # Where the tokens so far say, but between what fits and what does not.
        count = low + max(1, int((length - tokens) / probe))
        if high is not None and count >= high:
            count = (low + high) // 2
        prompt = prompt_of(count)
        needed = tokens_of(prompt)
        if needed > length:
            high = count
            continue
        low, best, tokens = count, prompt, needed
        if tokens == length:
            break
    return best, tokens


def _hide(puzzle: Puzzle, words: list[str]) -> str:
    """The text with the statements at their depths, each after the end of a sentence if there is one near."""
    pieces, done = [puzzle.before], 0
    for statement in sorted(puzzle.statements, key=lambda item: item.depth):
        place = _end_of_sentence(words, round(statement.depth * len(words)))
        pieces += [*words[done:place], f" {statement.text}"]
        done = place
    pieces += words[done:]
    text = "".join(pieces).strip()
    return text + puzzle.question if puzzle.question.startswith(".") else f"{text}\n{puzzle.question}".lstrip()


def _end_of_sentence(words: list[str], place: int) -> int:
    """The index nearest to `place` before which a sentence or a line ends; if none is near, the next one before which
    a word ends."""

    def ends(index: int) -> bool:
        white = index < len(words) and words[index][0].isspace()
        return white and (words[index - 1].endswith(_ENDS_OF_SENTENCES) or words[index][0] == "\n")

    near = sorted(
        range(max(0, place - _LOOK_FOR_END), min(len(words), place + _LOOK_FOR_END) + 1), key=lambda i: abs(i - place)
    )
    found = next((index for index in near if index in (0, len(words)) or ends(index)), None)
    if found is not None:
        return found
    return next((index for index in range(place, len(words)) if words[index][0].isspace()), len(words))
