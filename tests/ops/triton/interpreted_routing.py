"""Block summaries, selection and the dispatch index in Triton's interpreter."""

import doctest
import importlib
import itertools

import numpy as np
import pytest
import torch
from kernel_examples import cu, inputs, whole_numbers

from moba_megatron.ops import gathered
from moba_megatron.ops.layout import block_layout
from moba_megatron.ops.reference import reference_select
from moba_megatron.ops.triton import config, select_past, summarize
from moba_megatron.ops.triton.fragments import Spans, whole_pack
from moba_megatron.ops.triton.index import Cut, build_index
from moba_megatron.ops.triton.passes import Pass
from moba_megatron.ops.triton.splits import cut_spans
from moba_megatron.ops.triton.summaries import planes_of

PACKS = {
    "tail": ((0, 203), 32, 2),
    "odd": ((0, 63, 163), 16, 3),
    "uneven, an empty document": ((0, 5, 5, 68, 200, 201), 16, 4),
    "blocks of 24": ((0, 100, 100, 170), 24, 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pack", PACKS)
def test_means(pack, dtype):
    bounds, block_size, _ = PACKS[pack]
    _, k, _, _ = inputs(bounds[-1], 2, 2, size=24, dtype=dtype)
    layout = block_layout(bounds[-1], block_size, cu(bounds))
    torch.testing.assert_close(summarize(k, layout), gathered.summarize(k, layout), rtol=1e-6, atol=1e-6)


def test_planes_hold_the_whole_mean():
    """Three planes give back fp32's 24 bits, also of numbers far from 1."""
    means = torch.randn(64, 2, 16, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 16)
    for dtype in (torch.bfloat16, torch.float16):
        planes, step = planes_of(means, dtype)
        first, second, third = planes.double().unbind(0)
        whole = first + (second + third / step) / step
        assert ((whole - means.double()).abs() <= 2**-24 * means.abs().double()).all()


@pytest.mark.parametrize(
    ("pack", "num_heads", "num_kv_heads", "dtype"),
    [
        ("tail", 2, 2, torch.float32),
        ("odd", 5, 1, torch.float32),
        ("odd", 2, 1, torch.bfloat16),
        ("uneven, an empty document", 4, 2, torch.bfloat16),
        ("uneven, an empty document", 2, 1, torch.float16),
        ("blocks of 24", 3, 1, torch.bfloat16),
    ],
)
def test_selection_of_random_keys(pack, num_heads, num_kv_heads, dtype):
    """Exactly the reference's ids: the smallest margin between two scores exceeds what sums in fp32 may differ by."""
    bounds, block_size, num_past = PACKS[pack]
    q, k, _, _ = inputs(bounds[-1], num_heads, num_kv_heads, dtype=dtype)
    layout = block_layout(bounds[-1], block_size, cu(bounds))
    want = reference_select(q.double(), k.double(), cu(bounds), block_size, num_past)
    assert torch.equal(select_past(q, summarize(k, layout), layout, num_past), want)
    assert (want >= 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_past", [1, 5])
def test_ties_go_to_the_lower_block(num_past, dtype):
    bounds = cu([0, 70, 200])
    q, k = whole_numbers(200, 1, 1, size=4, dtype=dtype)
    layout = block_layout(200, 16, bounds)
    want = reference_select(q, k, bounds, 16, num_past)
    assert torch.equal(select_past(q, summarize(k, layout), layout, num_past), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_blocks", [7, 10, 70])
def test_equal_blocks_are_taken_from_the_lowest_on(num_blocks, dtype, monkeypatch):
    """Whatever the keys' values. The interpreter multiplies by numpy's BLAS, which sums the columns of a product in
    different orders; here every column is summed alike, as a matrix unit does."""
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: (a[:, :, None] * b).sum(axis=1, dtype=dtype))
    q, k, _, _ = inputs(num_blocks * 5, 2, 1, size=20, dtype=dtype)
    k = k[:5].repeat(num_blocks, 1, 1)
    layout = block_layout(num_blocks * 5, 5)
    lowest = torch.arange(5, dtype=torch.int32)
    want = lowest.where(lowest < layout.block_T.unsqueeze(1), -1).unsqueeze(1).expand(-1, 2, -1)
    assert torch.equal(reference_select(q, k, None, 5, 5), want)
    assert torch.equal(select_past(q, summarize(k, layout), layout, 5), want)


def test_all_scores_equal():
    q, k = torch.ones(200, 1, 16), torch.ones(200, 1, 16)
    layout = block_layout(200, 16)
    want = reference_select(q, k, None, 16, 3)
    assert torch.equal(select_past(q, summarize(k, layout), layout, 3), want) and want[-1, 0].tolist() == [0, 1, 2]


def test_nan_is_never_chosen():
    q, k, _, _ = inputs(128, 1, 1)
    k[17] = torch.nan
    layout = block_layout(128, 16)
    ids = select_past(q, summarize(k, layout), layout, 7)
    assert (ids != 1).all() and (ids[-1] >= 0).sum() == 6


def test_queries_of_some_tokens():
    """Under context parallelism the queries are some tokens of the pack."""
    q, k, _, _ = inputs(200, 2, 1)
    layout = block_layout(200, 16, cu([0, 70, 200]))
    some = torch.tensor([3, 40, 60, 100, 101, 150, 199])
    summaries = summarize(k, layout)
    got = select_past(q[some], summaries, layout.at(some), 3)
    assert torch.equal(got, select_past(q, summaries, layout, 3)[some])


def test_as_many_as_there_are():
    """K above the number of blocks, up to the most that is kept."""
    q, k, _, _ = inputs(70, 1, 1, size=8)
    layout = block_layout(70, 1)
    for num_past in (0, 64):
        got = select_past(q, summarize(k, layout), layout, num_past)
        assert torch.equal(got, reference_select(q, k, None, 1, num_past))


def test_refusals_name_the_values():
    q, k, _, _ = inputs(32, 1, 1)
    layout = block_layout(32, 16)
    with pytest.raises(ValueError, match="at most 64 past blocks per query, not 65.*65"):
        select_past(q, summarize(k, layout), layout, 65)
    with pytest.raises(ValueError, match="float64.*gathered"):
        summarize(k.double(), layout)
    with pytest.raises(ValueError, match="up to 256, not 257"):
        summarize(torch.zeros(32, 1, 257), layout)


@pytest.mark.parametrize("most_chunks", [1, 8])
def test_index_has_every_entry_once_and_in_order(monkeypatch, most_chunks):
    monkeypatch.setattr(config, "MOST_CHUNKS", most_chunks)
    bounds, block_size, num_past = cu([0, 5, 5, 68, 400]), 16, 3
    q, k, _, _ = inputs(400, 6, 2)
    layout = block_layout(400, block_size, bounds)
    ids = reference_select(q, k, bounds, block_size, num_past)
    work = Pass(slice(0, 2), slice(30, 390), 3, 0, num_past)
    index = build_index(work, ids, whole_pack(layout), Cut(32))
    entries = ids[30:390].view(360, 2, 3, num_past).transpose(0, 1)
    blocks = torch.where(entries >= 0, entries + layout.first_block_T[30:390].view(1, -1, 1, 1), -1)
    assert torch.equal(index.entry_kv_blocks, blocks.flatten().to(torch.int32))
    expected = [[] for _ in range(index.num_head_blocks)]
    for entry, block in enumerate(blocks.flatten().tolist()):
        if block >= 0:
            expected[entry // (entries.numel() // 2) * layout.num_blocks + block].append(entry)
    first = index.cu_entries.tolist()
    assert [index.order[a:b].tolist() for a, b in zip(first, first[1:], strict=False)] == expected


def expected_splits(counts, size, surplus_to):
    """Owner of each split, surplus ones included, and where the splits of each owner begin."""
    owners = [owner for owner, count in enumerate(counts) for _ in range(-(-count // size))]
    firsts = [0, *itertools.accumulate(-(-count // size) for count in counts)]
    return owners + [len(counts)] * (surplus_to - len(owners)), firsts


@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize("bounds", [[0, 300], [0, 5, 5, 68, 300]])
def test_splits_cover_every_entry(bounds, hot):
    """Several tiles of head blocks; one kv block may have more splits than a tile writes at once."""
    bounds = cu(bounds)
    q, k, _, _ = inputs(300, 4, 2)
    layout = block_layout(300, 4, bounds)
    ids = reference_select(q, k, bounds, 4, 3)
    if hot:
        ids = torch.where(layout.block_T > 0, 0, -1).view(-1, 1, 1).expand(-1, 4, 1).to(torch.int32).contiguous()
    fragment, slots = whole_pack(layout), ids.shape[2]
    work = Pass(slice(0, 2), slice(0, 300), 2, 0, slots)
    index = build_index(work, ids, fragment, Cut(4, fragment.kv_blocks.longest), Cut(3))
    counts = index.cu_entries.diff().tolist()
    assert sum(counts) == int((ids >= 0).sum()) and len(counts) == 2 * layout.num_blocks
    for splits, size in zip(index.splits, (4, 3), strict=True):
        owners, firsts = expected_splits(counts, size, splits.count)
        assert (splits.split_of.tolist(), splits.cu_splits.tolist()) == (owners, firsts)
    lengths = layout.block_lengths().repeat(2)[index.splits[0].split_of[: int(index.splits[0].cu_splits[-1])]]
    assert index.partial_start[: lengths.numel()].tolist() == [0, *lengths.cumsum(0).tolist()][:-1]
    assert int(lengths.sum()) <= index.num_partials
    alone = build_index(work, ids, fragment, Cut(3))
    assert alone.partial_start is None and torch.equal(alone.splits[0].split_of, index.splits[1].split_of)


@pytest.mark.parametrize(("bounds", "rows_per_token"), [([0, 3, 3, 7], 1), ([0, 300], 3), (list(range(0, 1500, 3)), 2)])
def test_spans_are_cut_once(bounds, rows_per_token):
    starts, ends = torch.tensor(bounds[:-1]), torch.tensor(bounds[1:])
    spans = Spans(starts, ends, int((ends - starts).max()), bounds[-1])
    splits = cut_spans(spans, 2, rows_per_token)
    counts = [(b - a) * rows_per_token for a, b in itertools.pairwise(bounds)]
    assert (splits.split_of.tolist(), splits.cu_splits.tolist()) == expected_splits(counts, 2, splits.count)
    assert cut_spans(spans, 2, rows_per_token) is splits and cut_spans(spans, 4, rows_per_token) is not splits


def test_examples_in_docstrings():
    names = ("config", "index", "passes", "summaries")
    outcomes = [doctest.testmod(importlib.import_module(f"moba_megatron.ops.triton.{name}")) for name in names]
    assert sum(o.attempted for o in outcomes) >= 4 and all(o.failed == 0 for o in outcomes)
