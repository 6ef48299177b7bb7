"""Expected time of the GPU kernels, from the operations and bytes of each: what `moba-megatron bench --model` prints.

A kernel takes the longest of four times, plus its launches: matrix products at a share of the peak, bytes at a share
of the memory bandwidth, bytes that are read again and again at the bandwidth of the cache, and the instructions of the
selection. Work is counted for one document, exactly: an *entry* is one (query, head, chosen past block); it moves a row
of q to its block and a partial output in the inputs' dtype to its place, and combining reads that again. Keys and
values of a block are read once, whatever reads follow from cache.

These are no measurements. The data sheets give peaks. The assumed shares of the peaks are below, with their reasons;
replace them first when measurements exist.

Legend: T tokens, N query heads, G key heads, D head size, B block size, K blocks per query, M blocks, E entries.
"""

from __future__ import annotations

from dataclasses import dataclass

from moba_megatron.ops.kernel_sizes import (
    PLANES,
    SCREENED_ROWS,
    SHORT_BLOCK,
    SPLIT_ENTRIES,
    SPLIT_ENTRIES_PER_KEY,
    backward_entry_bytes,
    default_workspace,
    forward_entry_bytes,
    pass_sizes,
    screens,
)
from moba_megatron.ops.pairs import attended_pairs, chosen_blocks, scored_pairs
from moba_megatron.planning.flops import PEAK_BF16
from moba_megatron.planning.index_shape import IndexShape

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
# With screening, for each of the two walks over the scores together; and for each query row and past block to choose:
# finding the threshold (256), listing (880), scoring exactly (660). Counted from the kernel's source for D = 128, with
# as many rounds of listing as 128 rows with random hits take.
SCREEN_INSTRUCTIONS, SCREEN_INSTRUCTIONS_PER_PAST = 19, 1800
# Query rows of a routing tile without screening; blocks that screening lists for each that is chosen.
ROUTE_ROWS, LISTED_PER_PAST = 64, 1.15
LAUNCH_SECONDS = 5e-6
# Counting, ranking of chunks, splits, scattering.
INDEX_LAUNCHES = 4


@dataclass(frozen=True)
class Machine:
    """A GPU by its data sheet: bytes/s of its memory, bf16 operations/s, and instructions/s of all lanes together. The
    bytes/s of its second-level cache, which no data sheet gives, are an assumption."""

    name: str
    bandwidth: float
    peak: float
    lanes: float
    cache: float


# Steps in plain PyTorch, for each tile of tokens; one tile is assumed.
INDEX_LOSS_LAUNCHES = 30
# Lanes: multiprocessors x 128 x boost clock.
MACHINES = (
    Machine("A100", 2.04e12, PEAK_BF16["A100"], 108 * 128 * 1.41e9, 4.0e12),
    Machine("H100", 3.35e12, PEAK_BF16["H100"], 132 * 128 * 1.98e9, 5.5e12),
    Machine("H200", 4.8e12, PEAK_BF16["H200"], 132 * 128 * 1.98e9, 5.5e12),
    Machine("B200", 8.0e12, PEAK_BF16["B200"], 148 * 128 * 1.85e9, 8.0e12),
)


@dataclass(frozen=True)
class AttentionSizes:
    """One document and one setting; `element_bytes` of q, k, v and of partial outputs. Where key heads have a K of
    their own, `top_k` is the largest of the layer's `budgets`, whose mean the heads at hand are taken to have.
    `workspace_bytes`: None for the default."""

    tokens: int
    heads: int
    kv_heads: int
    head_size: int
    block_size: int
    top_k: int
    element_bytes: int = 2
    partial_bytes: int = 2
    budgets: tuple[int, ...] | None = None
    index: IndexShape | None = None
    workspace_bytes: int | None = None

    @property
    def entries(self) -> int:
        """E, over all heads."""
        return int(self.heads * chosen_blocks(self.tokens, self.block_size, self.budgets or self.top_k))

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

    def passes(self, entry_bytes: int) -> int:
        """Passes into which the workspace cuts a call, for so many bytes of it an entry."""
        each, slots = self.heads // self.kv_heads, self.top_k - 1
        room = self.workspace_bytes or default_workspace(self.query_bytes)
        heads, tokens = pass_sizes(self.tokens, self.kv_heads, each, slots, entry_bytes, room)
        return -(-self.kv_heads // heads) * -(-self.tokens // tokens)

    @property
    def forward_passes(self) -> int:
        return self.passes(forward_entry_bytes(self.head_size, self.element_bytes))

    @property
    def backward_passes(self) -> int:
        return self.passes(backward_entry_bytes(self.head_size, self.element_bytes))

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
        cache_bytes: read from cache, beyond what is counted as bytes of memory.
        launches: kernels started.
    """

    name: str
    products: float = 0
    entry_bytes: float = 0
    stream_bytes: float = 0
    instructions: float = 0
    launches: int = 1
    cache_bytes: float = 0

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
            self.cache_bytes / machine.cache,
        )
        return max(times) + self.launches * LAUNCH_SECONDS


def route_work(sizes: AttentionSizes, screened: bool | None = None) -> list[Work]:
    """The kernels of routing: scores in three planes and the choice among them, or (`screened`, by default where the
    operator does so) one plane twice and then the listed blocks, which one kernel does one after the other."""
    heads, kv_heads, size = sizes.heads, sizes.kv_heads, sizes.head_size
    if sizes.index is not None:
        heads, kv_heads, size = sizes.index.queries, sizes.index.keys, sizes.index.size
    past, rows = sizes.top_k - 1, sizes.tokens * heads
    blocks = -(-sizes.tokens // sizes.block_size)
    means = blocks * kv_heads * size * 4
    scores = heads * scored_pairs(sizes.tokens, sizes.block_size)
    moved = sizes.tokens * heads * size * sizes.element_bytes + means + 4 * rows * past
    plane = 2 * size * scores
    if not (screens(blocks, past, sizes.element_bytes) if screened is None else screened):
        select = SELECT_INSTRUCTIONS + SELECT_INSTRUCTIONS_PER_K * sizes.top_k
        walked = PLANES * plane / ROUTE_ROWS
        return [Work("route", PLANES * plane, 0, moved, select * scores, 2, walked)]
    listed = rows * past * LISTED_PER_PAST * size * 4
    return [
        Work("route: screen", 2 * plane, 0, moved, SCREEN_INSTRUCTIONS * scores, 5, 2 * plane / SCREENED_ROWS),
        Work("route: listed", 0, 0, 0, SCREEN_INSTRUCTIONS_PER_PAST * rows * past, 0, listed),
    ]


def forward_work(sizes: AttentionSizes) -> list[Work]:
    """The kernels of a forward pass, routing included, in the order in which they run."""
    size, entries = sizes.head_size, sizes.entries
    slots = sizes.tokens * sizes.heads * (sizes.top_k - 1)
    blocks = -(-sizes.tokens // sizes.block_size)
    means = blocks * sizes.kv_heads * size * 4
    partial = size * sizes.partial_bytes + 4  # and its log-sum-exp
    statistics = sizes.tokens * sizes.heads * 4
    passes = sizes.forward_passes
    # An index entry names the row to gather.
    return [
        Work("means", stream_bytes=sizes.key_bytes / 2 + means),
        *route_work(sizes),
        Work("index", stream_bytes=16 * slots, launches=INDEX_LAUNCHES * passes),
        Work(
            "past blocks, short" if sizes.short else "past blocks, long",
            4 * size * sizes.past_pairs,
            entries * (sizes.row_bytes + partial),
            sizes.key_bytes + 4 * entries,
            launches=passes,
        ),
        Work(
            "own block + combine",
            4 * size * sizes.own_pairs,
            entries * partial,
            2 * sizes.query_bytes + sizes.key_bytes + statistics,
            launches=passes,
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
    passes = sizes.backward_passes
    own_keys = min(passes, sizes.kv_heads)  # once for the kv heads of a pass, whatever its tokens
    if sizes.short if fused is None else fused:
        past = [
            Work(
                "past blocks: dk, dv, dq", 10 * size * sizes.past_pairs, rows + entries * partial, summing,
                launches=2 * passes,
            )
        ]  # fmt: skip
    else:
        past = [
            Work("past blocks: dk, dv", 8 * size * sizes.past_pairs, rows, summing, launches=2 * passes),
            Work("past blocks: dq", 6 * size * sizes.past_pairs, rows + entries * partial, keys, launches=passes),
        ]
    own = 2 * sizes.query_bytes + sizes.key_bytes + statistics
    return [
        *_index_loss_work(sizes),
        Work("delta", stream_bytes=2 * sizes.query_bytes + statistics / 2),
        Work("index", stream_bytes=16 * slots, launches=INDEX_LAUNCHES * passes),
        *past,
        Work("own block: dk, dv", 8 * size * sizes.own_pairs, 0, own + sums + sizes.key_bytes, launches=own_keys),
        Work(
            "own block: dq + combine",
            6 * size * sizes.own_pairs,
            entries * partial,
            own + sizes.query_bytes,
            launches=passes,
        ),
    ]


def _index_loss_work(sizes: AttentionSizes) -> list[Work]:
    """What an index learns from, forward and backward: the summaries of the chosen blocks are gathered twice."""
    index = sizes.index
    if index is None or index.loss == "none":
        return []
    slots = sizes.tokens * index.queries * (sizes.top_k - 1)
    products = 6 * index.size * slots
    gathered, scores = 2 * slots * index.size * 4, 12 * slots
    if index.loss == "dense":
        products += 2 * sizes.head_size * sizes.heads * attended_pairs(sizes.tokens)
    return [Work(f"index: {index.loss} loss", products, gathered, scores, launches=INDEX_LOSS_LAUNCHES)]


def expected_seconds(sizes: AttentionSizes, machine: Machine, backward: bool) -> float:
    """Expected time of a forward pass, or of forward and backward; full attention where K blocks cover the document."""
    if min(sizes.budgets or (sizes.top_k,)) * sizes.block_size >= sizes.tokens:
        return dense_seconds(sizes, machine, backward)
    works = forward_work(sizes) + (backward_work(sizes) if backward else [])
    return sum(work.seconds(machine) for work in works)


def index_loss_seconds(sizes: AttentionSizes, machine: Machine) -> float:
    """Expected time of what an index learns from, forward and backward, beyond the choice itself; 0 without one."""
    return sum(work.seconds(machine) for work in _index_loss_work(sizes))


def dense_seconds(sizes: AttentionSizes, machine: Machine, backward: bool) -> float:
    """Expected time of the best full causal attention: 4 D operations a pair forward, 10 D backward."""
    forward = 4 * sizes.head_size * sizes.heads * attended_pairs(sizes.tokens) / machine.peak
    return forward / DENSE_SHARE + (2.5 * forward / DENSE_BACKWARD_SHARE if backward else 0)
