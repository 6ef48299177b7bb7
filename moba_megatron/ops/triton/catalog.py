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

from moba_megatron.ops.kernel_sizes import MOST_SCREENED, PLANES
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
    screening,
    splits,
    summaries,
)

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# Keys of the longest kv block or causal span: the short ones each have a tile of their own, the others share one.
LENGTHS = (16, 32, 64, 128, 512)
NUM_PAST = (1, 2, 7, 15, 31, 63)

ELEMENTS = (
    "q_ptr", "k_ptr", "v_ptr", "do_ptr", "partial_out_ptr", "partial_dq_ptr", "planes_ptr", "centred_ptr", "out_ptr",
    "dq_ptr", "result_dk_ptr", "result_dv_ptr",
)  # fmt: skip
SUMS = (
    "lse_ptr", "delta_ptr", "partial_lse_ptr", "means_ptr", "dk_ptr", "dv_ptr", "partial_dk_ptr", "partial_dv_ptr",
    "scores_ptr", "average_ptr", "bounds_ptr",
)  # fmt: skip
INT32 = (
    "ids_ptr", "entry_kv_block_ptr", "counts_ptr", "offsets_ptr", "order_ptr", "cu_entries_ptr", "split_of_ptr",
    "kv_block_of_block_ptr", "own_kv_block_ptr", "lengths_ptr", "flags_ptr", "totals_ptr", "other_split_of_ptr",
)  # fmt: skip
INT64 = (
    "block_start_ptr", "block_end_ptr", "span_start_ptr", "span_end_ptr", "kv_block_start_ptr", "kv_block_end_ptr",
    "cu_splits_ptr", "other_cu_splits_ptr", "partial_start_ptr", "first_block_ptr", "block_ptr",
)  # fmt: skip
FLOATS = ("softmax_scale", "plane_shrink", "plane_step")
# Integers that are multiples of 16, as strides of rows and heads are.
STRIDES = ("stride_kn", "stride_kh", "stride_kb")


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
        names = ("q_ptr", "k_ptr", "partial_out_ptr", "partial_dq_ptr", "do_ptr", "planes_ptr", "centred_ptr")
        names += ("result_dk_ptr",)
        return next((self.signature[name] for name in names if name in self.signature), "*fp32")[1:]

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
        lengths: keys of the longest kv block or causal span, which is the block size.
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
    # A whole pack, a rank's fragment with and without own kv blocks, and ids that are numbers of kv blocks.
    for first, table, own in ((1, 0, 0), (1, 1, 0), (1, 1, 1), (0, 0, 0)):
        flags = {"HAS_FIRST": bool(first), "HAS_TABLE": bool(table), "HAS_OWN": bool(own)}
        yield _Case(index.count_entries, config.tiles("count_entries") | flags)
    for kept in num_past:
        for own in (False, True):
            yield _Case(index.gather_entries, config.gather_tiles(kept) | {"HAS_OWN": own})
    yield _Case(index.rank_chunks, config.tiles("rank_chunks"))
    # Forward; backward of short kv blocks, and of long ones.
    for sums, other in ((False, False), (True, False), (True, True)):
        yield _Case(splits.split_entries, config.tiles("split_entries") | {"SUMS": sums, "OTHER": other})
    yield _Case(splits.split_spans, config.tiles("split_spans"))
    yield _Case(index.scatter_entries, config.tiles("scatter_entries"))
    for dtype in dtypes:
        for size in head_sizes:
            yield from _rows(dtype, size, num_past, architecture)
            for length in lengths:
                yield from _attention(dtype, size, length, architecture)


def _rows(dtype: torch.dtype, size: int, num_past: Sequence[int], architecture: int) -> Iterator[_Case]:
    for kernel in (summaries.block_means, backward_dq.output_delta_rows):
        yield _Case(kernel, config.tiles(kernel.__name__, dtype, size, architecture=architecture), dtype)
    # Sums of a range of tokens stay in fp32; the last are written as results. Their tiles are those of fp32.
    for types in ({"result_dk_ptr": "*fp32", "result_dv_ptr": "*fp32"}, {}):
        settings = config.tiles("combine_dkdv", dtype, size, architecture=architecture)
        yield _Case(combine.combine_dkdv, settings | {"GROUP": config.ADD_AT_ONCE}, dtype, types)
    settings = config.tiles("add_groups", dtype, size, architecture=architecture)
    yield _Case(combine.add_groups, settings | {"GROUP": config.ADD_AT_ONCE}, dtype)
    # Fragments are combined with outputs in fp32 or in the inputs' dtype; partial dq always with dq in fp32.
    combines = (
        (combine.combine_out, {}),
        (combine.combine_out, {"out_ptr": "*fp32"}),
        (combine.combine_dq, {"dq_ptr": "*fp32"}),
    )
    for kernel, types in combines:
        yield _Case(kernel, config.tiles(kernel.__name__, dtype, size, architecture=architecture), dtype, types)
    for kept in num_past:
        settings = config.route_tiles(dtype, size, kept, architecture=architecture)
        yield _Case(routing.route, settings | {"SPLIT": False, "FLAGGED": False}, dtype)
        if dtype == torch.float32:
            settings = config.route_tiles(dtype, size, kept, 1, architecture)
            yield _Case(routing.route, settings | {"SPLIT": True, "FLAGGED": False}, dtype)
        elif kept <= MOST_SCREENED:
            yield _Case(routing.route, settings | {"SPLIT": False, "FLAGGED": True}, dtype)
            yield _Case(screening.screen, config.screen_tiles(dtype, size, kept, architecture), dtype)
    if dtype != torch.float32:
        for kernel in (summaries.split_means, summaries.average_means, summaries.centre_means):
            planes = {"PLANES": PLANES} if kernel is summaries.split_means else {}
            yield _Case(kernel, config.tiles(kernel.__name__, torch.float32, size) | planes, dtype)
    yield _Case(
        decode.decode_fwd,
        config.tiles("decode_fwd", dtype, size, architecture=architecture),
        dtype,
        {"partial_out_ptr": "*fp32"},
    )


def _attention(dtype: torch.dtype, size: int, length: int, architecture: int) -> Iterator[_Case]:
    def case(name: str, kernel: Any, types: dict[str, str] | None = None, **flags: bool) -> _Case:
        settings = config.tiles(name, dtype, size, length, architecture)
        return _Case(kernel, settings | flags, dtype, types or {})

    if config.holds_kv_block("past_fwd_short", dtype, size, length, architecture):
        yield case("past_fwd_short", past.past_fwd_short)
    else:
        yield case("past_fwd_long", past.past_fwd_long)
    if config.holds_kv_block("past_dkdv_dq", dtype, size, length, architecture):
        yield case("past_dkdv_dq", backward_dkdv.past_dkdv, WRITE_DQ=True)
    else:
        yield case("past_dkdv", backward_dkdv.past_dkdv, WRITE_DQ=False)
        yield case("past_dq", backward_dq.past_dq)
    wide = {"out_ptr": "*fp32", "dq_ptr": "*fp32"}
    yield case("causal_dkdv", backward_dkdv.causal_dkdv)
    for types, combines in (({}, True), ({}, False), (wide, False)):
        yield case("causal_fwd", causal.causal_fwd, types, COMBINE=combines)
    for types, combines, adds in (({}, True, False), ({}, False, False), (wide, False, True)):
        yield case("causal_dq", backward_dq.causal_dq, types, COMBINE=combines, ADD=adds)
