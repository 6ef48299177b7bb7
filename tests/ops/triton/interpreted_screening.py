"""Screening of blocks in Triton's interpreter: what it proves is the definition's choice, and what it cannot prove is
scored again."""

import io

import pytest
import torch
from kernel_examples import cu, inputs, whole_numbers
from rich.console import Console

from moba_megatron.benchmark.operator import _scored_again
from moba_megatron.benchmark.report import print_bench
from moba_megatron.benchmark.settings import BenchResult, BenchRow, BenchSettings, Case
from moba_megatron.ops import kernel_sizes
from moba_megatron.ops.layout import block_layout
from moba_megatron.ops.reference import reference_select
from moba_megatron.ops.triton import routing, select_past, summarize
from moba_megatron.ops.triton.summaries import centred_plane

SIZE = 16


@pytest.fixture(autouse=True)
def always_screened(monkeypatch):
    monkeypatch.setattr(kernel_sizes, "SCREENED_BLOCKS", 1)


def chosen(q, k, layout, num_past, tokens=None):
    """Ids, and rows without a proof by tile and kv head; of some tokens of the pack, or of all."""
    queries = (q, layout) if tokens is None else (q[tokens], layout.at(tokens))
    ids, flags = routing._select(queries[0], summarize(k, layout), queries[1], num_past)
    q = queries[0]
    assert flags.shape == (-(-q.shape[0] * q.shape[1] // k.shape[1] // 128), k.shape[1])
    return ids, flags


def assert_best(ids, q, k, layout):
    """The ids of one document with one head are the best in fp64, by falling score, as far as scores lie further apart
    than fp32 sums may differ."""
    means, past, (_, _, num_past) = summarize(k, layout).double()[:, 0], layout.block_T, ids.shape
    scores = q.double()[:, 0] @ means.T
    unsure = SIZE * 2.0**-24 * (q.double().abs()[:, 0] @ means.abs().T)
    candidate = torch.arange(layout.num_blocks) < past.unsqueeze(1)
    best = scores.masked_fill(~candidate, -torch.inf).sort(dim=1, descending=True, stable=True)
    for row, own in enumerate(past.tolist()):
        got, count = ids[row, 0].tolist(), min(own, num_past)
        assert got[count:] == [-1] * (num_past - count) and len(set(got[:count])) == count
        for place, number in enumerate(got[:count]):
            wanted = int(best.indices[row, place])
            assert number < own
            gap = float((scores[row, number] - scores[row, wanted]).abs())
            assert number == wanted or gap <= float(unsure[row, number] + unsure[row, wanted]), (row, place)


@pytest.mark.parametrize(("dtype", "common"), [(torch.float16, 0), (torch.bfloat16, 10)])
def test_all_rows_are_proven(dtype, common):
    """Isotropic keys, and a common component of ten times the spread."""
    q, k, _, _ = inputs(140, 1, 1, dtype=torch.float32)
    k = (k + common * torch.randn(SIZE, generator=torch.Generator().manual_seed(1))).to(dtype)
    q, layout = q.to(dtype), block_layout(140, 2)
    ids, flags = chosen(q, k, layout, 3)
    assert not flags.any() and (ids[-1] >= 0).all()
    assert_best(ids, q, k, layout)


def test_without_the_average_a_common_component_is_not_proven():
    """What centring is for: the same keys, rounded with what they have in common, fill the lists."""
    q, k, _, _ = inputs(200, 1, 1)
    k = (k + 10 * torch.randn(SIZE, generator=torch.Generator().manual_seed(1))).bfloat16()
    means = summarize(k, block_layout(200, 2))
    _, bounds = centred_plane(means, torch.bfloat16)
    rest = (means - means.bfloat16().float()).norm(dim=-1)
    assert float(rest.mean()) > 5 * float(bounds.mean())


def test_a_pack_with_many_heads_and_some_tokens_of_it():
    q, k, _, _ = inputs(100, 4, 2, dtype=torch.bfloat16)
    bounds = cu([0, 5, 5, 40, 100])
    layout = block_layout(100, 4, bounds)
    ids, flags = chosen(q, k, layout, 2)
    assert not flags.any()
    assert torch.equal(ids, reference_select(q.double(), k.double(), bounds, 4, 2))
    some = torch.tensor([3, 20, 39, 40, 71, 99])
    assert torch.equal(chosen(q, k, layout, 2, some)[0], ids[some])


def test_equal_blocks_fill_every_list_and_are_taken_from_the_lowest_on():
    q, k = whole_numbers(140, 1, 1, dtype=torch.bfloat16)
    k = k[:2].repeat(70, 1, 1)
    ids, flags = chosen(q, k, block_layout(140, 2), 3)
    # Rows with at most 8 candidates have them all in their lists.
    assert flags[:, 0].tolist() == [128 - 18, 12]
    assert torch.equal(ids, reference_select(q, k, None, 2, 3))


def test_ties_go_to_the_lower_block_where_lists_hold_them():
    q, k = whole_numbers(200, 1, 1, size=4, dtype=torch.bfloat16)
    bounds = cu([0, 70, 200])
    layout = block_layout(200, 16, bounds)
    ids, flags = chosen(q, k, layout, 5)
    assert not flags.any()
    assert torch.equal(ids, reference_select(q, k, bounds, 16, 5))


def test_near_duplicates():
    """Blocks that one plane cannot tell apart: pairs and triples fit the lists, crowds do not, and all are ordered by
    fp32 scores."""
    generator = torch.Generator().manual_seed(2)
    few = torch.randn(32, SIZE, generator=generator).repeat_interleave(2, 0)
    crowd = 3 * torch.randn(1, SIZE, generator=generator).expand(32, -1)
    for rows, proven in ((few, True), (torch.cat([few, crowd]), False)):
        k = rows.unsqueeze(1).bfloat16()
        # The last bit of bf16 in one channel.
        k[1::2, :, 0] *= 1 + 2**-7
        tokens = k.shape[0]
        q, layout = inputs(tokens, 1, 1, seed=4)[0].bfloat16(), block_layout(tokens, 1)
        ids, flags = chosen(q, k, layout, 4)
        assert not flags.any() if proven else 0 < int(flags) < 32
        assert_best(ids, q, k, layout)


def test_only_flagged_tiles_are_scored_again_and_their_share_is_told(monkeypatch):
    q, k, _, _ = inputs(136, 1, 1, dtype=torch.bfloat16)
    layout, flags = block_layout(136, 2), torch.tensor([[0], [5]], dtype=torch.int32)
    means = summarize(k, layout)
    ids = []

    def leaves_five_rows(q, means, layout, ids_TNK):
        ids.append(ids_TNK.fill_(-7))
        return flags, 128

    monkeypatch.setattr(routing, "screen_past", leaves_five_rows)
    assert routing.shares_scored_again(q, means, layout, 3) == (5 / 136, 0.5)
    assert (ids[0][:128] == -7).all()
    assert torch.equal(ids[0][128:], reference_select(q.double(), k.double(), None, 2, 3)[128:])
    assert routing.shares_scored_again(q[:0], means, layout.at(torch.arange(0)), 3) is None


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_what_is_not_finite_is_never_chosen(bad):
    q, k, _, _ = inputs(128, 1, 1, dtype=torch.bfloat16)
    k[17], q[90] = bad, torch.nan
    layout = block_layout(128, 2)
    ids, _ = chosen(q, k, layout, 4)
    assert (ids != 8).all() and (ids[-1] >= 0).all() and (ids[90] == -1).all()
    k[16:18], q[90] = 0, 0
    others = reference_select(q.double(), k.double(), None, 2, 5)
    for got, want in zip(ids[100:, 0].tolist(), others[100:, 0].tolist(), strict=True):
        assert got == [number for number in want if number != 8][:4]


@pytest.mark.parametrize("scale", [2.0**-70, 2.0**-20, 2.0**70])
def test_queries_of_any_size(scale):
    """Below and above what the bound is good for, rows with more candidates than their lists hold are scored again."""
    q, k, _, _ = inputs(128, 1, 1, dtype=torch.bfloat16)
    q[50] = 0
    ids, flags = chosen(q * scale, k, block_layout(128, 2), 3)
    assert torch.equal(ids, reference_select(q.double(), k.double(), None, 2, 3))
    rows = {2.0**-70: 128 - 18, 2.0**70: 128 - 2}.get(scale, 1)
    assert int(flags) == rows


def test_keys_of_any_size():
    """An outlier widens no other block's bound, and keys near fp16's largest number leave its range when centred."""
    q, k, _, _ = inputs(128, 1, 1, dtype=torch.bfloat16)
    k[0] *= 1000
    ids, flags = chosen(q, k, block_layout(128, 1), 3)
    assert not flags.any() and torch.equal(ids, reference_select(q.double(), k.double(), None, 1, 3))
    q, k, _, _ = inputs(128, 1, 1, dtype=torch.float16)
    k[::4], k[1::4] = 6e4, -6e4
    ids, _ = chosen(q, k, block_layout(128, 4), 3)
    assert torch.equal(ids, reference_select(q.double(), k.double(), None, 4, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bounds_hold_and_are_of_use(dtype):
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(300, 2, 24, generator=generator) * torch.logspace(-3, 3, 300).view(-1, 1, 1)
    means[200:] = 0  # unused numbers
    centred, bounds = centred_plane(means, dtype)
    average = means[:200].double().mean(0)
    rest = (means.double() - average - centred.double()).norm(dim=-1)
    assert (rest <= bounds.double()).all() and bounds.isfinite().all()
    eps = torch.finfo(dtype).eps
    assert (bounds.double() <= 0.6 * eps * (centred.double().norm(dim=-1) + 1e-2)).all()


def test_blocks_are_screened_from_some_number_on(monkeypatch):
    """The rule is one on shapes, and the ids do not tell which way they were chosen."""
    q, k, _, _ = inputs(100, 1, 1, dtype=torch.bfloat16)
    layout, calls, screen_past = block_layout(100, 1), [], routing.screen_past
    monkeypatch.setattr(routing, "screen_past", lambda *x: calls.append(1) or screen_past(*x))
    found = []
    for least in (100, 101):
        monkeypatch.setattr(kernel_sizes, "SCREENED_BLOCKS", least)
        found.append(select_past(q, summarize(k, layout), layout, 5))
    assert calls == [1] and torch.equal(*found)


def test_the_benchmark_tells_what_is_scored_again(monkeypatch):
    settings = BenchSettings((40,), ((2, 3),), num_heads=1, num_kv_heads=1, head_size=16, backend="triton")
    case = Case("bf16", 40, 2, 3, "fwd")
    assert _scored_again(settings, case) == (0, 0)
    monkeypatch.undo()
    assert _scored_again(settings, case) == (None, None)
    numbers = (1, 1, 40, 2, 3, "fwd", "triton", 1.0, 2.0, "torch", 2.0, 3.0, 1e9, None, 8, 0.1)
    text = io.StringIO()
    rows = [BenchRow("bf16", *numbers), BenchRow("bf16", *numbers, rows_scored_again=0.001, tiles_scored_again=0.25)]
    print_bench(BenchResult(rows), Console(file=text, width=200))
    assert "scored again" in text.getvalue() and "0.10%, 25.00%" in text.getvalue()
