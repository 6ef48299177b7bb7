"""Every configuration in which the kernels can be launched, for compiling them without a GPU.

A configuration is a kernel with the types of its arguments and its sizes known at compile time, as `config` chooses
them for an element type, a head size and a block size. Types follow from the arguments' names, which mean the same in
all kernels. Integers but for strides are no part of it (`common.COUNTS`): any number of query heads per key head runs
the same code. Left out are strides that are not multiples of 16, and decoding with more than 16 query heads per key
head, whose routing takes a larger tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from moba_megatron.ops.triton import (
    backward_dkdv,
    backward_dq,
    causal,
    combine,
    config,
    decode,
    index,
    past,
    routing,
    summaries,
)

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# Keys of the longest unit or triangle: the short ones each have a tile of their own, the others share one.
LENGTHS = (16, 32, 64, 128, 512)
NUM_PAST = (1, 2, 7, 15, 31, 63)

ELEMENTS = ("q", "k", "v", "dout", "part", "planes", "out", "dq")
SUMS = ("lse", "delta", "part_lse", "means", "dk", "dv", "dk_sums", "dv_sums", "scores")
INT32 = ("ids", "units", "counts", "offsets", "order", "list_first", "list_of", "unit_of_block", "own_unit", "lengths")
INT64 = ("start", "end", "unit_start", "unit_end", "piece_first", "sum_first", "first_block", "block")
FLOATS = ("softmax_scale", "plane_shrink")
# Integers that are multiples of 16, as strides of rows and heads are.
STRIDES = ("k_row", "k_head", "k_sequence")


@dataclass(frozen=True)
class Configuration:
    """A kernel and all that its machine code depends on.

    Attributes:
        kernel: the `triton.jit` function.
        signature: type of each argument, in Triton's notation; sizes known at compile time are "constexpr".
        constexprs: their values.
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, int]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.__name__

    @property
    def element_type(self) -> str:
        """Of the rows that it reads, in Triton's notation."""
        return next((self.signature[name] for name in ("q", "k", "part", "dout") if name in self.signature), "*fp32")[
            1:
        ]

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.constexprs.items())
        return f"{self.name} {self.element_type} {sizes} warps={self.num_warps} stages={self.num_stages}"

    def source(self) -> ASTSource:
        """What Triton compiles. Addresses and strides are multiples of 16, as PyTorch's allocations are."""
        names = list(self.signature)
        aligned = [n for n in names if self.signature[n].startswith("*") or n in STRIDES]
        return ASTSource(
            self.kernel,
            self.signature,
            constexprs={(names.index(name),): value for name, value in self.constexprs.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        )

    def compile(self, architecture: int) -> CompiledKernel:
        """Machine code for a CUDA architecture (90 for sm_90); needs no GPU."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return triton.compile(self.source(), target=GPUTarget("cuda", architecture, 32), options=options)


@dataclass(frozen=True)
class _Case:
    """A kernel, the settings it is launched with, and the element types of arguments that may differ from q's."""

    kernel: Any
    settings: dict[str, int]
    dtype: torch.dtype = torch.bfloat16
    types: dict[str, str] = field(default_factory=dict)

    def configuration(self) -> Configuration:
        settings = dict(self.settings)
        warps, stages = settings.pop("num_warps"), settings.pop("num_stages", 3)
        signature = {}
        for name in self.kernel.arg_names:
            signature[name] = "constexpr" if name in settings else self.types.get(name) or self._type(name)
        return Configuration(self.kernel, signature, settings, warps, stages)

    def _type(self, name: str) -> str:
        for names, kind in ((ELEMENTS, DTYPES[self.dtype]), (SUMS, "fp32"), (INT32, "i32"), (INT64, "i64")):
            if name in names:
                return f"*{kind}"
        return "fp32" if name in FLOATS else "i32"


def configurations(
    architecture: int = config.DEFAULT_ARCHITECTURE,
    *,
    dtypes: Sequence[torch.dtype] = tuple(DTYPES),
    head_sizes: Sequence[int] = config.HEAD_SIZES,
    lengths: Sequence[int] = LENGTHS,
    num_past: Sequence[int] = NUM_PAST,
) -> list[Configuration]:
    """The configurations of one architecture, each once: all, or those of some types and sizes.

    Args:
        lengths: keys of the longest unit or triangle, which is the block size.
        num_past: past blocks per query.
    """
    found: dict[str, Configuration] = {}
    for case in _cases(architecture, dtypes, head_sizes, lengths, num_past):
        made = case.configuration()
        found.setdefault(f"{made} {made.signature}", made)
    return list(found.values())


def _cases(
    architecture: int,
    dtypes: Sequence[torch.dtype],
    head_sizes: Sequence[int],
    lengths: Sequence[int],
    num_past: Sequence[int],
) -> Iterator[_Case]:
    # A whole pack, a rank's fragment with and without own blocks, and ids that are unit numbers.
    for first, table, own_unit in ((1, 0, 0), (1, 1, 0), (1, 1, 1), (0, 0, 0)):
        flags = {"HAS_FIRST": bool(first), "HAS_TABLE": bool(table), "HAS_OWN": bool(own_unit)}
        yield _Case(index.count_entries, config.tiles("count_entries") | flags)
    yield _Case(index.scatter_entries, config.tiles("scatter_entries"))
    for dtype in dtypes:
        for size in head_sizes:
            yield from _rows(dtype, size, num_past, architecture)
            for length in lengths:
                yield from _attention(dtype, size, length, architecture)


def _rows(dtype: torch.dtype, size: int, num_past: Sequence[int], architecture: int) -> Iterator[_Case]:
    for kernel in (summaries.block_means, combine.add_pieces, backward_dq.output_delta_rows):
        yield _Case(kernel, config.tiles(kernel.__name__, dtype, size, architecture=architecture), dtype)
    # Fragments are merged into fp32 or into outputs in the inputs' dtype; shares of dq always into fp32.
    merges = ((combine.merge_rows, {}), (combine.merge_rows, {"out": "*fp32"}), (combine.add_dq, {"dq": "*fp32"}))
    for kernel, types in merges:
        yield _Case(kernel, config.tiles(kernel.__name__, dtype, size, architecture=architecture), dtype, types)
    for kept in num_past:
        settings = config.route_tiles(dtype, size, kept, architecture=architecture)
        yield _Case(routing.select_blocks, settings | {"SPLIT": False}, dtype)
        if dtype == torch.float32:
            settings = config.route_tiles(dtype, size, kept, 1, architecture)
            yield _Case(routing.select_blocks, settings | {"SPLIT": True}, dtype)
    yield _Case(
        decode.attend_cached,
        config.tiles("attend_cached", dtype, size, architecture=architecture),
        dtype,
        {"part": "*fp32"},
    )


def _attention(dtype: torch.dtype, size: int, length: int, architecture: int) -> Iterator[_Case]:
    def case(name: str, kernel: Any, types: dict[str, str] | None = None, **flags: bool) -> _Case:
        settings = config.tiles(name, dtype, size, length, architecture)
        return _Case(kernel, settings | flags, dtype, types or {})

    if config.holds_unit("attend_short_units", dtype, size, length, architecture):
        yield case("attend_short_units", past.attend_short_units)
    else:
        yield case("attend_long_units", past.attend_long_units)
    if config.holds_unit("units_dkdv_dq", dtype, size, length, architecture):
        yield case("units_dkdv_dq", backward_dkdv.units_dkdv, WRITE_DQ=True)
    else:
        yield case("units_dkdv", backward_dkdv.units_dkdv, WRITE_DQ=False)
        yield case("units_dq", backward_dq.units_dq)
    wide = {"out": "*fp32", "dq": "*fp32"}
    yield case("own_dkdv", backward_dkdv.own_dkdv)
    for types, merge in (({}, True), ({}, False), (wide, False)):
        yield case("attend_own", causal.attend_own, types, MERGE=merge)
    for types, merge, add in (({}, True, False), ({}, False, False), (wide, False, True)):
        yield case("own_dq", backward_dq.own_dq, types, MERGE=merge, ADD=add)
