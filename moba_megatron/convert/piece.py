"""Rectangles that Hugging Face tensors and Megatron parameters share, and the ways in which tensors are arranged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from moba_megatron.config.family import Family


@dataclass(frozen=True)
class Piece:
    """A rectangle that a Hugging Face tensor and a Megatron parameter share.

    Attributes:
        source: name of the Hugging Face tensor.
        there: slices of that tensor, for its first dimensions; a number where the parameter is one of several in it.
        here: slices of the parameter, for the same dimensions without those.
    """

    source: str
    there: tuple[slice | int, ...] = ()
    here: tuple[slice, ...] = ()


@dataclass(frozen=True)
class Arrangement:
    """How a Hugging Face model names and joins its tensors.

    Attributes:
        fused: queries, keys and values are one tensor, gate and up projection another.
        mixture: the module of a layer that holds its router and experts.
        parts: gate, up and down projection of an expert; None: all experts of a layer lie in two tensors.
    """

    fused: bool = False
    mixture: str = "mlp"
    parts: tuple[str, str, str] | None = ("gate_proj", "up_proj", "down_proj")

    @staticmethod
    def of(family: Family) -> Arrangement:
        """As the files of a family are."""
        return Arrangement(family.fused, family.mixture, family.expert_parts)

    @property
    def stacked(self) -> Arrangement:
        """The same where all experts of a layer lie in two tensors: transformers 5 in memory, and in files where it is
        told so (`save_original_format=False`). Its module has one name in all families."""
        return replace(self, mixture="mlp", parts=None)

    def found_in(self, names: Iterable[str]) -> Arrangement:
        """This one, or `stacked` where one of these names of tensors says so."""
        return self.stacked if any(name.endswith(STACKED) for name in names) else self


APART = Arrangement()
"""The arrangement of most families."""
STACKED = ".experts.gate_up_proj"


def columns(source: str, rows: int, size: int, rank: int) -> Piece:
    """The columns of one rank: `size` of them from those of the ranks before it on."""
    everything = slice(0, rows)
    return Piece(source, (everything, slice(rank * size, (rank + 1) * size)), (everything, slice(0, size)))


def gate_and_up(
    prefix: str,
    size: int,
    rank: int,
    ranks: int,
    fused: bool = False,
    names: tuple[str, ...] = ("gate_proj", "up_proj"),
) -> Iterator[Piece]:
    """Gate over up, each `size` rows in all, of which a rank has its part of each."""
    rows = size // ranks
    for number, name in enumerate(names):
        first = rank * rows + (number * size if fused else 0)
        source = f"{prefix}{'gate_up_proj' if fused else name}.weight"
        yield Piece(source, (slice(first, first + rows),), (slice(number * rows, (number + 1) * rows),))
