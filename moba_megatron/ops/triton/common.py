"""What all kernels share: matrix products, and where a query row lies.

Conventions of every kernel here. Tensors are contiguous but for keys and values, which have a row and a head stride.
`HEAD_SIZE` is D and `WIDTH` the power of two that holds it; columns beyond D are read as zero. `group_size` is the
number of query heads per key head: the rows of a key head are numbered token by token and, within a token, head by
head, so that any number of heads fills a tile. Scores are kept in base 2: exp(x) is exp2(x * LOG2_E). Addresses are
64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Integers that differ from call to call or from model to model: compiled code does not depend on their values, so that
# what `catalog` compiles is what runs.
COUNTS = [
    "num_rows",
    "num_tokens",
    "num_blocks",
    "num_lists",
    "num_units",
    "num_stretches",
    "num_heads",
    "num_groups",
    "num_past",
    "group_size",
    "first_token",
    "first_group",
    "slots",
    "block_size",
    "pieces",
    "parts",
    "part_blocks",
    "chunks",
    "chunk_entries",
    "entries",
    "piece_size",
    "tile_rows",
]


@triton.jit
def _probe():
    pass


# Programs on the second axis of a launch where two axes count together: an axis but the first holds 65,535.
PER_AXIS = tl.constexpr(32768)

# Triton's interpreter multiplies bf16 wrongly; in it, 16-bit operands are widened first.
INTERPRETED = tl.constexpr(not isinstance(_probe, triton.runtime.JITFunction))


@triton.jit
def dot(a, b, acc=None):
    """a @ b (+ acc) with fp32 sums; fp32 operands are multiplied in fp32, not in TF32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def quotient(number, divisor):
    """number // divisor of int32 that are not negative, for which the unsigned division takes fewer instructions."""
    return (number.to(tl.uint32) // divisor.to(tl.uint32)).to(tl.int32)


@triton.jit
def row_offsets(origin, row, token, num_heads, group_size):
    """Places in a [T, N] tensor, as int64, of rows (token * group_size + head) that count from the place `origin`."""
    return origin + row + token.to(tl.int64) * (num_heads - group_size)


@triton.jit
def second_id():
    """Number of a program on the second and third axis together, as `config.spread` makes them."""
    return tl.program_id(1) + tl.program_id(2) * PER_AXIS


@triton.jit
def load_rows(source, offset, inside, HEAD_SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of HEAD_SIZE elements at `source + offset` as a tile [rows, WIDTH]; zero outside."""
    column = tl.arange(0, WIDTH)
    mask = inside[:, None]
    if HEAD_SIZE < WIDTH:
        mask = mask & (column < HEAD_SIZE)[None, :]
    return tl.load(source + offset[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def load_keys(source, key, row_stride, length, HEAD_SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Rows `key` of `length` adjacent keys or values from `source` on, as a tile; zero beyond them."""
    return load_rows(source, key.to(tl.int64) * row_stride, key < length, HEAD_SIZE, WIDTH)


@triton.jit
def store_rows(target, offset, inside, tile, HEAD_SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """The reverse of `load_rows`, in the target's dtype."""
    column = tl.arange(0, WIDTH)
    mask = inside[:, None]
    if HEAD_SIZE < WIDTH:
        mask = mask & (column < HEAD_SIZE)[None, :]
    tl.store(target + offset[:, None] + column[None, :], tile.to(target.dtype.element_ty), mask=mask)


@triton.jit
def safe_lse(lse):
    """Log-sum-exps in base 2 for exp2(score - lse): rows without keys (-inf) get weight 0 instead of NaN."""
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
