"""The meaning of `--tasks` and the options around it."""

from __future__ import annotations

from dataclasses import dataclass

from moba_megatron.config.lengths import parse_length
from moba_megatron.evaluation.tasks.puzzles import TASKS

ALL = "all"
_SHORTEST = 128
_DEFAULT_LENGTHS = 4


@dataclass(frozen=True)
class TaskOptions:
    """What to ask.

    Attributes:
        names: of `TASKS`.
        depths: for tasks that have one, 0 to 1.
        lengths: tokens of prompt and answer; None: the model's usual length and its halves, four lengths in all.
        samples: for each task, length and depth; a task without depths gets as many as there are over all depths.
        haystack: see `load_haystack`.
        seed: of the samples.
    """

    names: list[str]
    depths: list[float]
    lengths: list[int] | None = None
    samples: int = 10
    haystack: str | None = None
    seed: int = 0

    def lengths_for(self, window: int, set_by: str, usual: int) -> list[int]:
        """The lengths, compared with the tokens that a model can take, and the setting that says so.

        Args:
            usual: tokens that the model was trained on, or its window where that is not known.

        Raises:
            ValueError: one is longer than the window.
        """
        if self.lengths is None:
            halves = [usual >> i for i in range(_DEFAULT_LENGTHS)]
            return sorted({length for length in halves if length >= _SHORTEST} or {usual})
        if max(self.lengths) > window:
            raise ValueError(
                f"--lengths {max(self.lengths)} is over the model's window of {window} tokens "
                f"({set_by}): samples are never cut; ask for lengths up to {window}"
            )
        return self.lengths


def task_options(tasks: str, *, lengths: str | None, depths: str, samples: int, haystack: str | None) -> TaskOptions:
    """Options from words of the command line.

    Args:
        tasks: names with commas, or `all`.
        lengths: numbers of tokens with commas, such as `4096,32K`; None: by the model's usual length.
        depths: numbers from 0 to 1 with commas.

    Raises:
        ValueError: an unknown task, or what is not such a number.
    """
    return TaskOptions(
        names=parse_tasks(tasks),
        depths=_parse_depths(depths),
        lengths=None if lengths is None else parse_lengths(lengths),
        samples=samples,
        haystack=haystack,
    )


def parse_tasks(text: str) -> list[str]:
    """Names of tasks with commas, or `all`.

    Raises:
        ValueError: an unknown task, or none.
    """
    names = list(TASKS) if text == ALL else _parts(text)
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise ValueError(
            f"--tasks {text}: {', '.join(unknown) or 'no name'} is not a task; there are {', '.join(TASKS)}"
        )
    return names


def parse_lengths(text: str) -> list[int]:
    """Rising numbers of tokens, from numbers with commas such as `4096,32K`.

    Raises:
        ValueError: what is not such a number, or none.
    """
    lengths = sorted({parse_length("--lengths", part) for part in _parts(text)})
    if not lengths:
        raise ValueError(f"--lengths {text!r} names no length")
    return lengths


def _parts(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _parse_depths(text: str) -> list[float]:
    depths = sorted({_depth(part) for part in _parts(text)})
    if not depths:
        raise ValueError(f"--depths {text!r} names no depth")
    return depths


def _depth(text: str) -> float:
    try:
        depth = float(text)
    except ValueError:
        depth = -1.0
    if not 0 <= depth <= 1:
        raise ValueError(f"--depths: {text!r} is not a number from 0 (start of the text) to 1 (its end)")
    return depth
