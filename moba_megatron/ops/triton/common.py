"""What all kernels share: matrix products, and how rows are addressed, loaded and stored.

Conventions of every kernel here, beside the words of `ops`:

- `q_ptr` is an address, `q` the tile loaded from it; `offs_m`, `offs_n` and `offs_d` are offsets of query rows, of keys
  within their kv block or causal span, and of channels; `mask_m` and `mask_n` say which of them exist.
- Tensors are contiguous but for keys and values, which have the strides `stride_kn` of a row and `stride_kh` of a head.
- `HEAD_DIM` is D and `BLOCK_D` the power of two that holds it; channels beyond D are read as zero. `BLOCK_M` and
  `BLOCK_N` are the query rows and keys of a tile.
- The rows of a kv head are numbered token by token and, within a token, head by head, so that any number of query heads
  fills a tile.
- Scores are kept in base 2: exp(x) is exp2(x * LOG2_E). Addresses are 64-bit.
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
    "num_head_blocks",
    "num_kv_blocks",
    "num_spans",
    "num_heads",
    "num_kv_heads",
    "num_result_heads",
    "num_past",
    "qheads_per_kvhead",
    "first_token",
    "first_kv_head",
    "num_slots",
    "block_size",
    "num_splits",
    "split_size",
    "other_num_splits",
    "other_split_size",
    "rows_per_token",
    "num_chunks",
    "chunk_size",
    "num_entries",
    "tile_rows",
    "flag_rows",
]


# In place of a block number: no block.
NO_BLOCK = tl.constexpr(2**31 - 1)


@triton.jit
def bounds_of(number, start_ptr, end_ptr):
    """(first token, number of tokens) of a kv block or span."""
    start = tl.load(start_ptr + number)
    return start, (tl.load(end_ptr + number) - start).to(tl.int32)


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
def query_rows(origin, offs_m, token, num_heads, qheads_per_kvhead):
    """Query rows (token * N + head), as int64, of the rows offs_m (token * qheads_per_kvhead + head) of a kv head,
    which count from the query row `origin`."""
    return origin + offs_m + token.to(tl.int64) * (num_heads - qheads_per_kvhead)


@triton.jit
def rows_of_span(tile, start, length, first_token, num_tokens, qheads_per_kvhead, BLOCK_M: tl.constexpr):
    """A tile of the rows of a kv head in a span: their numbers, their places in the span, and which of them exist and
    are tokens of the pass."""
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    position = quotient(offs_m, qheads_per_kvhead)
    token = start + position
    return offs_m, position, (position < length) & (token >= first_token) & (token < first_token + num_tokens)


@triton.jit
def second_id():
    """Number of a program on the second and third axis together, as `config.spread` makes them."""
    return tl.program_id(1) + tl.program_id(2) * PER_AXIS


@triton.jit
def load_rows(ptr, offset, mask_m, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of HEAD_DIM elements at `ptr + offset` as a tile [rows, BLOCK_D]; zero where masked."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask_m[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    return tl.load(ptr + offset[:, None] + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def load_kv(ptr, offs_n, stride_kn, length, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows offs_n of `length` adjacent keys or values from `ptr` on, as a tile; zero beyond them."""
    return load_rows(ptr, offs_n.to(tl.int64) * stride_kn, offs_n < length, HEAD_DIM, BLOCK_D)


@triton.jit
def store_rows(ptr, offset, mask_m, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The reverse of `load_rows`, in the target's dtype."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask_m[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (offs_d < HEAD_DIM)[None, :]
    tl.store(ptr + offset[:, None] + offs_d[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def safe_lse(lse):
    """Log-sum-exps in base 2 for exp2(s - lse): rows without keys (-inf) get probability 0 instead of NaN."""
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)


@triton.jit
def best_of(s, number):
    """Of each row the highest score, and the lowest number that has it."""
    best = tl.max(s, axis=1)
    return best, tl.min(tl.where(s == best[:, None], number, NO_BLOCK), axis=1)


@triton.jit
def row_norms(x):
    """Euclidean norms of rows in fp32, scaled so that no square leaves fp32's range; inf from elements of 2^100 on."""
    largest = tl.max(tl.abs(x), axis=1)
    scale = tl.where((largest > 0) & (largest < 2.0**100), largest, 1.0)
    scaled = x / scale[:, None]
    norm = scale * tl.sqrt(tl.sum(scaled * scaled, axis=1))
    return tl.where(largest < 2.0**100, norm, norm + float("inf"))
