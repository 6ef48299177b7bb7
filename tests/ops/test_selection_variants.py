"""Variants of the selection: ids and attention of each against its plain, dense definition."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch

import moba_megatron
from moba_megatron.ops import full_attention, moba_attention, select_blocks
from moba_megatron.ops.adapters import flash_moba_attention
from moba_megatron.ops.layout import block_layout
from moba_megatron.ops.pairs import attended_pairs
from moba_megatron.ops.reference import reference_select
from moba_megatron.ops.selection import MOBA, SELECTORS, SUMMARIES, Selection
from moba_megatron.ops.summaries import MIN_MAX

VARIANTS = {
    "quest": Selection(summary="min_max"),
    "threshold": Selection("threshold", threshold=0.7),
    "threshold of bounds": Selection("threshold", "min_max", 0.4),
    "mean of heads": Selection(share_selection="mean"),
    "max of heads": Selection(share_selection="max"),
    "threshold of shared bounds": Selection("threshold", "min_max", 0.4, "mean"),
    "window": Selection("recent"),
    "sink": Selection("sink_recent"),
}
SELECTIONS = pytest.mark.parametrize("selection", VARIANTS.values(), ids=VARIANTS.keys())
PACKS = [None, (0, 5, 5, 37, 100), (0, 96, 100), (0, 1, 2, 3, 100)]


def cu(bounds):
    return None if bounds is None else torch.tensor(bounds, dtype=torch.int32)


def inputs(heads: int, kv_heads: int, dtype=torch.float64, seed: int = 0, tokens: int = 100):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, n, 8) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def definition(q, k, v, ids, bounds, block_size):
    """Softmax over the keys of the chosen blocks and the causal own block, row by row; ids [T, N, K] of past blocks."""
    rows = []
    for start, end in zip(bounds or (0, len(q)), (bounds or (0, len(q)))[1:], strict=False):
        for token in range(start, end):
            own = (token - start) // block_size
            keys = list(range(start + own * block_size, token + 1))
            for head in range(q.shape[1]):
                kv_head = head // (q.shape[1] // k.shape[1])
                past = [
                    start + b * block_size + i for b in ids[token, head].tolist() if b >= 0 for i in range(block_size)
                ]
                seen = torch.tensor(sorted(past) + keys)
                weights = (k[seen, kv_head] @ q[token, head] / math.sqrt(q.shape[2])).softmax(dim=0)
                rows.append(weights @ v[seen, kv_head])
    return torch.stack(rows).view_as(q)


@SELECTIONS
@pytest.mark.parametrize("bounds", PACKS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1)])
@pytest.mark.parametrize(("block_size", "top_k"), [(4, 2), (8, 4), (4, 1), (16, 50), (1, 3)])
def test_ids_equal_the_definition(selection, bounds, heads, kv_heads, block_size, top_k):
    q, k, *_ = inputs(heads, kv_heads, seed=3)
    got = select_blocks(q, k, cu(bounds), block_size=block_size, top_k=top_k, **selection.settings)
    assert torch.equal(got[:, 0, 0].long(), block_layout(100, block_size, cu(bounds)).block_T)
    assert torch.equal(got[..., 1:], reference_select(q, k, cu(bounds), block_size, top_k - 1, selection))


@SELECTIONS
@pytest.mark.parametrize("backend", ["gathered", "reference"])
@pytest.mark.parametrize("bounds", PACKS[:2])
def test_outputs_and_gradients_equal_the_definition(selection, backend, bounds):
    q, k, v, do = inputs(4, 2, seed=4)
    ids = select_blocks(q, k, cu(bounds), block_size=8, top_k=3, **selection.settings)[..., 1:]
    plain = select_blocks(q, k, cu(bounds), block_size=8, top_k=3)[..., 1:]
    assert not torch.equal(ids.sort(dim=-1).values, plain.sort(dim=-1).values), "the variant shows nowhere"
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = definition(*leaves, ids, bounds, 8)
    wanted = [expected, *torch.autograd.grad(expected, leaves, do)]
    out = moba_attention(*leaves, cu(bounds), block_size=8, top_k=3, backend=backend, **selection.settings)
    for got, want in zip([out, *torch.autograd.grad(out, leaves, do)], wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_hand_made_selection_by_bounds():
    """A wide block has mean 0 and a large bound; a query of either sign prefers it to a narrow one of mean 2."""
    k = torch.tensor([9.0, -9.0, 2.0, 2.0, 1.0, 1.0, 0.0]).view(7, 1, 1)
    q = torch.tensor([1.0, -1.0]).repeat(7, 1).view(7, 2, 1)
    assert select_blocks(q, k, block_size=2, top_k=2)[-1].tolist() == [[3, 1], [3, 0]]
    assert select_blocks(q, k, block_size=2, top_k=3, summary="min_max")[-1].tolist() == [[3, 0, 1], [3, 0, 2]]


def test_bounds_in_parts_are_bounds_of_the_whole():
    k, layout = inputs(1, 2, torch.float32)[1], block_layout(100, 8, cu((0, 5, 37, 100)))
    block_T, lengths = layout.pack_block_T, layout.block_lengths()
    whole = MIN_MAX.finish(MIN_MAX.partial(k, block_T, layout.num_blocks), lengths)
    halves = [MIN_MAX.partial(k[part], block_T[part], layout.num_blocks) for part in (slice(0, 41), slice(41, 100))]
    assert torch.equal(MIN_MAX.finish(MIN_MAX.combine(*halves), lengths), whole)
    for block in range(layout.num_blocks):
        inside = k[block_T == block]
        assert torch.equal(whole[block], torch.cat([inside.amax(0), -inside.amin(0)], dim=-1))
    # Bounds of bf16 keys are keys, in the precision of scores.
    assert MIN_MAX.partial(k.bfloat16(), block_T, layout.num_blocks).dtype == torch.float32


def test_ties_go_to_the_lower_block():
    ones = torch.ones(40, 1, 4)
    assert select_blocks(ones, ones, block_size=4, top_k=4, summary="min_max")[39, 0].tolist() == [9, 0, 1, 2]
    # Nine equal shares: three of them are the first to reach 0.3, two miss it.
    got = select_blocks(ones, ones, block_size=4, top_k=6, selector="threshold", threshold=0.3)
    assert got[39, 0].tolist() == [9, 0, 1, 2, -1, -1]


def test_threshold_takes_at_least_one_and_at_most_k():
    q, k, *_ = inputs(2, 1, seed=5)
    counts = {}
    for share in (1e-6, 0.5, 0.9, 1.0):
        ids = select_blocks(q, k, block_size=4, top_k=6, selector="threshold", threshold=share)
        counts[share] = (ids[:, :, 1:] >= 0).sum(dim=-1)
    past = torch.arange(100).unsqueeze(1) // 4
    assert torch.equal(counts[1e-6], past.clamp(max=1).expand(-1, 2))
    assert torch.equal(counts[1.0], past.clamp(max=5).expand(-1, 2))
    assert (counts[0.5] <= counts[0.9]).all() and counts[0.5].sum() < counts[0.9].sum() < counts[1.0].sum()


def test_other_modules_do_not_look_at_its_words():
    """But for the definition, in an export too, and the configuration; defaults of arguments say MoBA and are in no
    comparison."""
    package = Path(moba_megatron.__file__).parent
    alone = {package / "ops/selection.py", package / "ops/reference.py", *package.glob("config/*.py")}
    alone.add(package / "convert/portable_modeling.py")
    words = {*SELECTORS, *SUMMARIES}
    looking = []
    for path in {*package.rglob("*.py")} - alone:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                found = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)} & words
                looking += [f"{path.relative_to(package)}:{node.lineno}"] if found else []
            names = isinstance(node, ast.ImportFrom) and {alias.name for alias in node.names}
            looking += [str(path.relative_to(package))] if names and names & {"SELECTORS", "SUMMARIES"} else []
    assert looking == []


def test_windows_cost_what_moba_costs():
    q, k, *_ = inputs(2, 1)
    for selector in ("top_k", "recent", "sink_recent"):
        ids = select_blocks(q, k, block_size=8, top_k=4, selector=selector)[..., 1:]
        own = (torch.arange(100) % 8 + 1).sum()
        assert int((ids >= 0).sum()) * 8 + 2 * int(own) == 2 * attended_pairs(100, 8, 4)
        assert all(len(set(row)) == len(row) for row in ids[99].tolist())


@SELECTIONS
def test_enough_blocks_are_full_attention_unless_a_threshold_says_otherwise(selection):
    q, k, v, _ = inputs(4, 2)
    for backend in ("auto", "gathered", "reference"):
        out = moba_attention(q, k, v, block_size=16, top_k=7, backend=backend, **selection.settings)
        same = torch.allclose(out, full_attention(q, k, v), rtol=1e-10, atol=1e-10)
        assert same == selection.fills_up, backend


@SELECTIONS
def test_half_precision_chooses_as_its_values_do_in_fp32(selection):
    q, k, *_ = inputs(4, 2, torch.bfloat16)
    got = select_blocks(q, k, block_size=8, top_k=3, **selection.settings)
    assert torch.equal(got, select_blocks(q.float(), k.float(), block_size=8, top_k=3, **selection.settings))


@SELECTIONS
def test_no_future_token_shows(selection):
    q, k, v, _ = inputs(4, 2)
    out = moba_attention(q, k, v, block_size=8, top_k=3, backend="gathered", **selection.settings)
    for x in (q, k, v):
        x[61:] = 7.0
    changed = moba_attention(q, k, v, block_size=8, top_k=3, backend="gathered", **selection.settings)
    # The rows that share a tile may be others now, so not bit for bit.
    torch.testing.assert_close(out[:61], changed[:61], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(out[61:], changed[61:])


@SELECTIONS
def test_tracers_see_the_same(selection):
    q, k, v, do = inputs(2, 1)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def attend(*tensors):
        return moba_attention(*tensors, cu((0, 37, 100)), block_size=8, top_k=3, **selection.settings)

    eager = attend(*leaves)
    traced = torch.compile(attend, backend="aot_eager", fullgraph=True)(*leaves)
    torch.testing.assert_close(traced, eager, rtol=0, atol=0)
    for got, want in zip(*(torch.autograd.grad(out, leaves, do) for out in (traced, eager)), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("share", ["mean", "max"])
def test_heads_that_choose_together(share):
    """Query heads of a key head have the same blocks; those of one alone choose as without sharing, bit for bit."""
    q, k, v, _ = inputs(6, 2, torch.float32)
    ids = select_blocks(q, k, block_size=8, top_k=3, share_selection=share).unflatten(1, (2, 3))
    assert (ids == ids[:, :, :1]).all() and (ids[:, 0] != ids[:, 1]).any()
    assert (ids.flatten(1, 2) != select_blocks(q, k, block_size=8, top_k=3)).any()
    alone = q[:, ::3].contiguous()
    for one in (select_blocks, lambda *x, **y: moba_attention(*x, v, **y)):
        assert torch.equal(
            one(alone, k, block_size=8, top_k=3, share_selection=share), one(alone, k, block_size=8, top_k=3)
        )


def test_scores_are_shared_not_queries():
    """Two heads that look opposite ways score blocks of mean 3, -4 and 1 by +x and -2x: the mean of scores likes the
    second, their maximum the second, and by bounds, which are no linear score, the mean is not that of summed queries.
    """
    keys = torch.tensor([3.0, 3.0, -4.0, -4.0, 1.0, 1.0, 0.0, 0.0]).view(8, 1, 1)
    q = torch.tensor([1.0, -2.0]).repeat(8, 1).unsqueeze(2)

    def first(**settings):
        return select_blocks(q, keys, block_size=2, top_k=2, **settings)[-1, :, 1].tolist()

    assert first() == [0, 1] and first(share_selection="mean") == first(share_selection="max") == [1, 1]
    keys[4:6, 0, 0] = torch.tensor([-3.5, 9.0])
    # Bounds: scores of 3, -4, 9 and of -6, 8, 7.
    assert first(summary="min_max") == [2, 1] and first(summary="min_max", share_selection="mean") == [2, 2]
    equal = torch.ones(8, 1, 1)
    assert select_blocks(q, equal, block_size=2, top_k=3, share_selection="mean")[-1].tolist() == [[3, 0, 1]] * 2


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"selector": "nearest"}, "selector = 'nearest': choose one of top_k"),
        ({"summary": "max"}, "summary = 'max': choose one of mean, min_max"),
        ({"selector": "recent", "summary": "min_max"}, "no effect with selector = 'recent'"),
        ({"selector": "threshold"}, "threshold = None with selector = 'threshold'"),
        ({"threshold": 0.9}, "threshold = 0.9 with selector = 'top_k'"),
        ({"selector": "threshold", "threshold": 0.0}, "threshold = 0.0: a share above 0"),
        ({"selector": "threshold", "threshold": 1.5}, "threshold = 1.5: a share above 0"),
        ({"share_selection": "sum"}, "share_selection = 'sum': choose one of none, mean, max"),
        ({"selector": "recent", "share_selection": "mean"}, "share_selection = 'mean' has no effect with selector"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, named):
    q, k, v, _ = inputs(2, 1)
    with pytest.raises(ValueError, match=named):
        moba_attention(q, k, v, block_size=8, top_k=3, **settings)
    with pytest.raises(ValueError, match=named):
        select_blocks(q, k, block_size=8, top_k=3, **settings)


def test_a_backend_that_chooses_by_itself_refuses_variants():
    q, k, v = (x.bfloat16() for x in inputs(2, 1)[:3])
    sizes = {"block_size": 64, "top_k": 2, "softmax_scale": None, "max_seqlen": None}
    for selection, named in ((VARIANTS["window"], "recent"), (VARIANTS["quest"], "top_k of min_max")):
        with pytest.raises(ValueError, match=f"selection by {named}: only top_k of mean"):
            flash_moba_attention(q, k, v, None, **sizes, selection=selection)


def test_plain_moba_is_the_default():
    assert Selection() == MOBA and MOBA.is_plain
    assert not any(selection.is_plain for selection in VARIANTS.values())
    assert {s.selector for s in VARIANTS.values()} | {"top_k"} == set(SELECTORS)
    assert {s.summary for s in VARIANTS.values()} == set(SUMMARIES)
