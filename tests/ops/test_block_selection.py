"""Layout, summaries, selectors and routing: exact ids on inputs whose arithmetic is exact."""

import pytest
import torch

from moba_megatron.ops import select_blocks
from moba_megatron.ops.gathered import select_past, summarize
from moba_megatron.ops.layout import block_layout
from moba_megatron.ops.reference import reference_select
from moba_megatron.ops.selection import Selection
from moba_megatron.ops.selectors import Recent, SinkAndRecent
from moba_megatron.ops.summaries import MEAN

PACKS = [None, (0, 5, 5, 37, 100), (0, 0, 16, 17, 100), (0, 96, 100), (0, 1, 2, 3, 100), (0, 50, 50, 50, 100, 100)]


def cu(bounds):
    return None if bounds is None else torch.tensor(bounds, dtype=torch.int32)


def integers(*shape, seed, low=-4, high=5):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("bounds", PACKS)
@pytest.mark.parametrize("block_size", [1, 7, 16, 200])
def test_layout_by_counting(bounds, block_size):
    layout = block_layout(100, block_size, cu(bounds))
    expected, number, starts, runs = [], 0, [], []
    for document, (start, end) in enumerate(zip(bounds or (0, 100), (bounds or (0, 100))[1:], strict=False)):
        for token in range(start, end):
            block = (token - start) // block_size
            expected.append((document, block, number + block))
            if (token - start) % block_size == 0:
                starts.append(token)
        number += -(-(end - start) // block_size)
    got = zip(layout.document_T.tolist(), layout.block_T.tolist(), layout.pack_block_T.tolist(), strict=True)
    assert list(got) == expected
    assert layout.num_blocks == number and layout.block_starts().tolist() == starts
    for start, count, length in layout.equal_blocks():
        runs += [start + i * length for i in range(count)]
    assert runs == starts and sum(c * n for _, c, n in layout.equal_blocks()) == 100


def test_summaries_are_means_and_partials_combine():
    k, layout = integers(100, 2, 4, seed=1), block_layout(100, 8, cu((0, 5, 37, 100)))
    whole = summarize(k, layout)
    for block, start in enumerate(layout.block_starts().tolist()):
        inside = (layout.pack_block_T == block).nonzero().flatten()
        assert inside[0] == start
        torch.testing.assert_close(whole[block], k[inside].mean(0))
    block_T = layout.pack_block_T
    halves = [MEAN.partial(k[part], block_T[part], layout.num_blocks) for part in (slice(0, 41), slice(41, 100))]
    # Sums of small integers are exact in any order.
    assert torch.equal(MEAN.finish(MEAN.combine(*halves), layout.block_lengths()), whole)
    assert MEAN.partial(k.bfloat16(), block_T, layout.num_blocks).dtype == torch.float32


def test_hand_made_selection():
    """Blocks of two tokens with means 1, 5, 5, 2, 9: a query of 1 ranks 5 (the lower first), 5, 2, 1; -1 backwards."""
    means = torch.tensor([1.0, 5.0, 5.0, 2.0, 9.0])
    k = (means.repeat_interleave(2) + torch.tensor([1.0, -1.0]).repeat(5)).view(10, 1, 1)
    q = torch.tensor([1.0, -1.0]).repeat(10, 1).view(10, 2, 1)
    ids = select_blocks(q, k, block_size=2, top_k=4)
    assert ids.dtype == torch.int32 and ids.shape == (10, 2, 4)
    assert ids[9].tolist() == [[4, 1, 2, 3], [4, 0, 3, 1]]
    assert ids[4].tolist() == [[2, 1, 0, -1], [2, 0, 1, -1]]
    assert ids[0].tolist() == [[0, -1, -1, -1]] * 2
    assert select_blocks(q, k, block_size=2, top_k=1)[9].tolist() == [[4]] * 2


@pytest.mark.parametrize("bounds", PACKS)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (2, 2), (3, 1)])
@pytest.mark.parametrize(("block_size", "top_k"), [(1, 3), (4, 2), (8, 4), (16, 50)])
def test_equals_reference_with_exact_ties(bounds, num_heads, num_kv_heads, block_size, top_k):
    """Small integers and blocks of a power of two: every score is exact, so ties are many and must fall alike."""
    q, k = integers(100, num_heads, 2, seed=2), integers(100, num_kv_heads, 2, seed=3, low=-1, high=2)
    got = select_blocks(q, k, cu(bounds), block_size=block_size, top_k=top_k)
    assert torch.equal(got[..., 1:], reference_select(q, k, cu(bounds), block_size, top_k - 1))
    assert torch.equal(got[:, 0, 0].long(), block_layout(100, block_size, cu(bounds)).block_T)


def test_all_scores_equal_takes_the_lowest_blocks():
    ids = select_blocks(torch.ones(40, 1, 4), torch.ones(40, 1, 4), block_size=4, top_k=4)
    assert ids[39, 0].tolist() == [9, 0, 1, 2]


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])


def repeated_blocks(pattern, block_size, num_heads, num_kv_heads, head_size, dtype):
    """Random q, and k in which equal letters of the pattern are equal blocks of random keys."""
    generator = torch.Generator().manual_seed(len(pattern))
    blocks = {x: torch.randn(block_size, num_kv_heads, head_size, generator=generator) for x in sorted(set(pattern))}
    q = torch.randn(len(pattern) * block_size, num_heads, head_size, generator=generator)
    return q.to(dtype), torch.cat([blocks[letter] for letter in pattern]).to(dtype)


def by_letters(q, k, pattern, block_size, summary):
    """int32 [T, N, blocks]: all past blocks by the score of their letter in fp64, then by number; -1 where fewer."""
    repeat = q.shape[1] // k.shape[1]
    blocks = k.double().repeat_interleave(repeat, dim=1).unflatten(0, (-1, block_size))
    scores = {}
    for letter in set(pattern):
        keys = blocks[pattern.index(letter)]
        bounds = [keys.mean(0)] * 2 if summary == "mean" else [keys.amin(0), keys.amax(0)]
        scores[letter] = torch.maximum(*(q.double() * bound for bound in bounds)).sum(-1)
    scores_TNM = torch.stack([scores[letter] for letter in pattern], dim=-1)
    number = torch.arange(len(pattern))
    past = number < (torch.arange(len(q)) // block_size).view(-1, 1, 1)
    order = scores_TNM.masked_fill(~past, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    return order.where(number < past.sum(-1, keepdim=True), -1).to(torch.int32)


@DTYPES
@pytest.mark.parametrize("summary", ["mean", "min_max"])
@pytest.mark.parametrize("pattern", ["A" * 7, "A" * 10, "ABBABAABAAB", "ABC" * 11])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size"), [(1, 1, 16), (6, 2, 20), (4, 1, 64)])
def test_equal_blocks_are_taken_from_the_lowest_on(
    pattern, dtype, summary, num_heads, num_kv_heads, head_size, monkeypatch
):
    """Whatever the keys' values: a product may sum every column in another order."""
    q, k = repeated_blocks(pattern, 5, num_heads, num_kv_heads, head_size, dtype)
    want = by_letters(q, k, pattern, 5, summary)
    past = len(pattern)
    assert torch.equal(reference_select(q, k, None, 5, past, Selection(summary=summary)), want)
    for tokens in (1024, 1, 7):
        monkeypatch.setattr("moba_megatron.ops.gathered.routing.TOKENS_ON_CPU", tokens)
        assert torch.equal(select_blocks(q, k, block_size=5, top_k=past + 1, summary=summary)[..., 1:], want)


@DTYPES
def test_equal_blocks_of_several_documents(dtype):
    pattern = "AABAABAAABBABAAAABABA"
    q, k = repeated_blocks(pattern, 4, 4, 2, 20, dtype)
    parts = [(0, 7), (7, 8), (8, 21)]
    want = torch.full((len(q), 4, 20), -1, dtype=torch.int32)
    for start, end in parts:
        rows, past = slice(4 * start, 4 * end), end - start
        want[rows, :, :past] = by_letters(q[rows], k[rows], pattern[start:end], 4, "mean")
    bounds = cu([0, *(4 * end for _, end in parts)])
    assert torch.equal(reference_select(q, k, bounds, 4, 20), want)
    assert torch.equal(select_blocks(q, k, bounds, block_size=4, top_k=21)[..., 1:], want)


def test_random_selection_with_a_margin_equals_fp64():
    generator = torch.Generator().manual_seed(7)
    q, k = (torch.randn(512, heads, 32, generator=generator) for heads in (4, 2))
    layout, num_past = block_layout(512, 16), 3
    scores = torch.einsum("tgrd,mgd->tgrm", q.double().view(512, 2, 2, 32), summarize(k.double(), layout)).flatten(1, 2)
    blocks = torch.arange(layout.num_blocks)
    scores.masked_fill_((blocks >= layout.block_T[:, None])[:, None], -torch.inf)
    best = scores.sort(dim=-1, descending=True).values
    ids = select_past(q, summarize(k, layout), layout, num_past)
    exact = select_past(q.double(), summarize(k.double(), layout), layout, num_past)
    # Rows whose last chosen and first refused score (and whose chosen scores among themselves) differ beyond fp32
    # rounding.
    gaps = (best[..., :num_past] - best[..., 1 : num_past + 1]).nan_to_num(nan=torch.inf)
    clear = gaps.amin(-1) > 1e-4
    assert clear.float().mean() > 0.9
    assert torch.equal(ids[clear], exact[clear])


def test_tiles_do_not_show(monkeypatch):
    q, k, bounds = integers(100, 2, 4, seed=5), integers(100, 1, 4, seed=6), cu((0, 5, 37, 100))
    whole = select_blocks(q, k, bounds, block_size=4, top_k=3)
    monkeypatch.setattr("moba_megatron.ops.gathered.routing.SCORES_ON_CPU", 100)
    assert torch.equal(select_blocks(q, k, bounds, block_size=4, top_k=3), whole)


def test_selectors_without_scores():
    layout = block_layout(20, 4, cu((0, 14, 20)))
    q, summaries = torch.zeros(20, 2, 1), torch.zeros(layout.num_blocks, 1, 1)
    recent = select_past(q, summaries, layout, 2, Recent())
    assert recent[[0, 5, 13, 19], 0].tolist() == [[-1, -1], [0, -1], [2, 1], [0, -1]]
    sink = select_past(q, summaries, layout, 2, SinkAndRecent())
    assert sink[[0, 5, 13, 19], 1].tolist() == [[-1, -1], [0, -1], [0, 2], [0, -1]]
    five = SinkAndRecent().choose(None, torch.tensor([3]), 5)
    assert five.tolist() == [[0, 2, 1, -1, -1]]
