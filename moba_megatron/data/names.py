"""Names, for people, of places in the inputs: which file, and which line or row of it."""

from __future__ import annotations

from moba_megatron.data.documents import MIB
from moba_megatron.data.plan import Plan
from moba_megatron.data.recipe import JsonlSource
from moba_megatron.data.sources import place_name


class PlaceNames:
    """Names the items of a plan's parts.

    Lines of JSONL are numbered within their part. What must be added is found by reading the file once, when first
    asked for a part that does not begin at its start.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self._before: dict[str, dict[int, int]] = {}

    def of(self, part: int, number: int) -> str:
        """Name of item `number` of a part."""
        piece = self.plan.parts[part]
        source, before = self.plan.recipe.sources[piece.source], 0
        if isinstance(source, JsonlSource) and piece.start:
            (path,) = piece.names
            if path not in self._before:
                own = {other.start for other in self.plan.parts if other.names == piece.names}
                self._before[path] = lines_before(path, own)
            before = self._before[path][piece.start]
        return place_name(source, piece, number, before)


def lines_before(path: str, starts: set[int]) -> dict[int, int]:
    """How many lines of a file begin before each of these bytes. Reads the file once."""
    found, lines, position = {0: 0}, 1, 0
    with open(path, "rb") as stream:
        for start in sorted(starts - {0}):
            # A line begins after each newline among the bytes before the last one before `start`.
            while position < start - 1:
                piece = stream.read(min(MIB, start - 1 - position))
                if not piece:
                    break
                lines += piece.count(b"\n")
                position += len(piece)
            found[start] = lines
    return found
