"""Expected time of the GPU kernels, from the operations and bytes of each: what `moba-megatron bench --model` prints.

A kernel takes the longest of three times, plus its launches: matrix products at a share of the peak, bytes at a share
of the memory bandwidth, and the instructions of the selection. Work is counted for one document, exactly: an *entry* is
one (query, head, chosen past block); it moves a row of q to its block and a partial output in the inputs' dtype to its
place, and combining reads that again. Keys and values of a block are read once, whatever reads follow from cache.

These are no measurements. The data sheets give peaks. The assumed shares of the peaks are below, with their reasons;
replace them first when measurements exist.

Legend: T tokens, N query heads, G key heads, D head size, B block size, K blocks per query, M blocks, E entries.
"""

from __future__ import annotations

from dataclasses import dataclass

from moba_megatron.ops.kernel_sizes import PLANES, SHORT_BLOCK, SPLIT_ENTRIES, SPLIT_ENTRIES_PER_KEY
from moba_megatron.ops.pairs import attended_pairs, chosen_blocks, scored_pairs
from moba_megatron.planning.flops import PEAK_BF16

# Streams: 4.3 of 4.8 TB/s were seen on an H200. Gathered and scattered rows of 256 bytes: an assumption.
STREAM_SHARE, GATHER_SHARE = 0.9, 0.8
# Plain bf16 products: 790 of 989 TFLOP/s were seen on an H200. Attention tiles reach 50% to 65% of that, as the best
# public attention kernels do: an assumption for ours.
PRODUCT_SHARE = 0.8
TILE_SHARE = 0.55 * PRODUCT_SHARE
# Full causal attention by the best kernels, forward and backward: what their makers report on Hopper, rounded.
DENSE_SHARE, DENSE_BACKWARD_SHARE = 0.6, 0.5
# Instructions of one lane to keep the best K of a stream of scores, per score: by insertion, an estimate.
SELECT_INSTRUCTIONS, SELECT_INSTRUCTIONS_PER_K = 55, 3.5
LAUNCH_SECONDS = 5e-6


@dataclass(frozen=True)
class Machine:
    """A GPU by its data sheet: bytes/s of its memory, bf16 operations/s, and instructions/s of all lanes together."""

    name: str
    bandwidth: float
    peak: float
    lanes: float


# Lanes: multiprocessors x 128 x boost clock.
MACHINES = (
    Machine("A100", 2.04e12, PEAK_BF16["A100"], 108 * 128 * 1.41e9),
    Machine("H100", 3.35e12, PEAK_BF16["H100"], 132 * 128 * 1.98e9),
    Machine("H200", 4.8e12, PEAK_BF16["H200"], 132 * 128 * 1.98e9),
    Machine("B200", 8.0e12, PEAK_BF16["B200"], 148 * 128 * 1.85e9),
)


@dataclass(frozen=True)
class AttentionSizes:
    """One document and one setting; `element_bytes` of q, k, v and of partial outputs."""

    tokens: int
    heads: int
    kv_heads: int
    head_size: int
    block_size: int
    top_k: int
    element_bytes: int = 2
    partial_bytes: int = 2

    @property
    def entries(self) -> int:
        """E, over all heads."""
        return self.heads * chosen_blocks(self.tokens, self.block_size, self.top_k)

    @property
    def past_pairs(self) -> int:
        return self.entries * self.block_size

    @property
    def own_pairs(self) -> int:
        return self.heads * attended_pairs(self.tokens, self.block_size, 1)

    @property
    def sum_bytes(self) -> float:
        """Partial dk and dv in fp32 that splits of entries write and combining reads."""
        split = max(SPLIT_ENTRIES, SPLIT_ENTRIES_PER_KEY * self.block_size)
        head_blocks = self.kv_heads * (self.tokens // self.block_size)
        return max(head_blocks, self.entries / split) * self.block_size * self.head_size * 16

    @property
    def query_bytes(self) -> int:
        """Size of q."""
        return self.tokens * self.heads * self.head_size * self.element_bytes

    @property
    def key_bytes(self) -> int:
        """Size of k and v together."""
        return 2 * self.tokens * self.kv_heads * self.head_size * self.element_bytes

    @property
    def row_bytes(self) -> int:
        """Size of one row of q."""
        return self.head_size * self.element_bytes

    @property
    def short(self) -> bool:
        return self.block_size <= SHORT_BLOCK


@dataclass(frozen=True)
class Work:
    """The work of one kernel.

    Attributes:
        products: floating-point operations on the matrix units.
        entry_bytes: bytes of rows and statistics moved entry by entry (gathered or scattered).
        stream_bytes: all other bytes.
        instructions: of the selection, over all lanes.
        launches: kernels started.
    """

    name: str
    products: float = 0
    entry_bytes: float = 0
    stream_bytes: float = 0
    instructions: float = 0
    launches: int = 1

    @property
    def bytes(self) -> float:
        return self.entry_bytes + self.stream_bytes

    def seconds(self, machine: Machine) -> float:
        """Expected time on a machine."""
        moved = self.entry_bytes / GATHER_SHARE + self.stream_bytes / STREAM_SHARE
        times = (
            self.products / (machine.peak * TILE_SHARE),
            moved / machine.bandwidth,
            self.instructions / machine.lanes,
        )
        return max(times) + self.launches * LAUNCH_SECONDS


def forward_work(sizes: AttentionSizes) -> list[Work]:
    """The kernels of a forward pass, routing included, in the order in which they run."""
    size, entries = sizes.head_size, sizes.entries
    slots = sizes.tokens * sizes.heads * (sizes.top_k - 1)
    blocks = -(-sizes.tokens // sizes.block_size)
    means = blocks * sizes.kv_heads * size * 4
    scores = sizes.heads * scored_pairs(sizes.tokens, sizes.block_size)
    partial = size * sizes.partial_bytes + 4  # and its log-sum-exp
    statistics = sizes.tokens * sizes.heads * 4
    select = SELECT_INSTRUCTIONS + SELECT_INSTRUCTIONS_PER_K * sizes.top_k
    # An index entry names the row to gather.
    return [
        Work("means", stream_bytes=sizes.key_bytes / 2 + means),
        Work("route", PLANES * 2 * size * scores, 0, sizes.query_bytes + means + 4 * slots, select * scores),
        Work("index", stream_bytes=16 * slots, launches=5),
        Work(
            "past blocks, short" if sizes.short else "past blocks, long",
            4 * size * sizes.past_pairs,
            entries * (sizes.row_bytes + partial),
            sizes.key_bytes + 4 * entries,
        ),
        Work(
            "own block + combine",
            4 * size * sizes.own_pairs,
            entries * partial,
            2 * sizes.query_bytes + sizes.key_bytes + statistics,
        ),
    ]


def backward_work(sizes: AttentionSizes, fused: bool | None = None) -> list[Work]:
    """The kernels of a backward pass: five products for a pair where one kernel makes dk, dv and dq (`fused`, by
    default for short blocks), else seven."""
    size, entries, row = sizes.head_size, sizes.entries, sizes.row_bytes
    slots = sizes.tokens * sizes.heads * (sizes.top_k - 1)
    partial = size * sizes.partial_bytes
    statistics = 2 * sizes.tokens * sizes.heads * 4
    rows = entries * (2 * row + 8)  # q, the output's gradient, log-sum-exp and delta
    keys = sizes.key_bytes + 4 * entries
    # dk and dv are summed in fp32.
    sums = sizes.key_bytes / sizes.element_bytes * 4
    summing = keys + sizes.sum_bytes + 2 * sums
    if sizes.short if fused is None else fused:
        past = [Work("past blocks: dk, dv, dq", 10 * size * sizes.past_pairs, rows + entries * partial, summing)]
    else:
        past = [
            Work("past blocks: dk, dv", 8 * size * sizes.past_pairs, rows, summing),
            Work("past blocks: dq", 6 * size * sizes.past_pairs, rows + entries * partial, keys),
        ]
    own = 2 * sizes.query_bytes + sizes.key_bytes + statistics
    return [
        Work("delta", stream_bytes=2 * sizes.query_bytes + statistics / 2),
        Work("index", stream_bytes=16 * slots, launches=5),
        *past,
        Work("own block: dk, dv", 8 * size * sizes.own_pairs, 0, own + sums + sizes.key_bytes),
        Work("own block: dq + combine", 6 * size * sizes.own_pairs, entries * partial, own + sizes.query_bytes),
    ]


def expected_seconds(sizes: AttentionSizes, machine: Machine, backward: bool) -> float:
    """Expected time of a forward pass, or of forward and backward; full attention where K blocks cover the document."""
    if sizes.top_k * sizes.block_size >= sizes.tokens:
        return dense_seconds(sizes, machine, backward)
    works = forward_work(sizes) + (backward_work(sizes) if backward else [])
    return sum(work.seconds(machine) for work in works)


def dense_seconds(sizes: AttentionSizes, machine: Machine, backward: bool) -> float:
    """Expected time of the best full causal attention: 4 D operations a pair forward, 10 D backward."""
    forward = 4 * sizes.head_size * sizes.heads * attended_pairs(sizes.tokens) / machine.peak
    return forward / DENSE_SHARE + (2.5 * forward / DENSE_BACKWARD_SHARE if backward else 0)
