"""Lists of valid numbers for messages."""

from __future__ import annotations

from collections.abc import Sequence


def nearest_multiples(value: int, unit: int) -> str:
    """The multiples of `unit` on both sides of `value`, for a message.

    >>> nearest_multiples(100, 8), nearest_multiples(3, 8)
    ('96 or 104', '8')
    """
    below = value // unit * unit
    return " or ".join(str(number) for number in (below, below + unit) if number)


def divisors(number: int) -> list[int]:
    """All divisors of a number, rising.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [size for size in range(1, number + 1) if number % size == 0]


def one_of(choices: Sequence[object]) -> str:
    """Choices for a message.

    >>> one_of([1, 2, 4])
    '1, 2 or 4'
    """
    *first, last = [str(choice) for choice in choices]
    return f"{', '.join(first)} or {last}" if first else last
