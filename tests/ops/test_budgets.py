"""A K of its own for each key head: the same as if every key head were a call by itself, with its own K."""

from __future__ import annotations

import pytest
import torch

from moba_megatron.ops import full_attention, moba_attention, select_blocks
from moba_megatron.ops.decode import continue_text, decode_tokens
from moba_megatron.ops.library import traced_attention
from moba_megatron.ops.pairs import attended_pairs
from moba_megatron.ops.selection import MOBA, Selection

TOKENS, HEADS, KV_HEADS, BLOCK = 100, 6, 3, 8
BUDGETS = [2, 5, 1]
BOUNDS = torch.tensor([0, 5, 5, 41, 100], dtype=torch.int32)
SELECTIONS = {
    "mean": {},
    "bounds": {"summary": "min_max"},
    "threshold": {"selector": "threshold", "threshold": 0.6},
    "shared": {"share_selection": "mean"},
    "window": {"selector": "recent"},
    "sink": {"selector": "sink_recent"},
}
EVERY_SELECTION = pytest.mark.parametrize("how", SELECTIONS.values(), ids=SELECTIONS.keys())


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shapes = [(TOKENS, n, 8) for n in (HEADS, KV_HEADS, KV_HEADS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def by_key_head(function, q, *keys_and_values):
    """What `function(K, q, k, ...)` gives for each key head and its query heads, side by side."""
    each = HEADS // KV_HEADS
    parts = [
        function(k, q[:, g * each : (g + 1) * each], *(x[:, g : g + 1] for x in keys_and_values))
        for g, k in enumerate(BUDGETS)
    ]
    return torch.cat(parts, dim=1)


@EVERY_SELECTION
@pytest.mark.parametrize("backend", ["reference", "gathered", "auto"])
def test_each_key_head_attends_as_by_itself(backend, how):
    settings = {"block_size": BLOCK, "backend": backend, **how}
    leaves = [x.requires_grad_() for x in inputs()]
    out = moba_attention(*leaves, BOUNDS, top_k=BUDGETS, **settings)
    alone = by_key_head(lambda top_k, *qkv: moba_attention(*qkv, BOUNDS, top_k=top_k, **settings), *leaves)
    torch.testing.assert_close(out, alone, rtol=0, atol=1e-12)
    do = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    for got, want in zip(torch.autograd.grad(out, leaves, do), torch.autograd.grad(alone, leaves, do), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@EVERY_SELECTION
def test_ids_are_the_first_of_the_choice(how):
    q, k, _ = inputs()
    ids = select_blocks(q, k, BOUNDS, block_size=BLOCK, top_k=BUDGETS, **how)
    assert ids.shape == (TOKENS, HEADS, max(BUDGETS))

    def alone(top_k, q, k):
        found = select_blocks(q, k, BOUNDS, block_size=BLOCK, top_k=top_k, **how)
        return torch.nn.functional.pad(found, (0, max(BUDGETS) - top_k), value=-1)

    assert torch.equal(ids, by_key_head(alone, q, k))


def test_equal_ones_are_the_number():
    q, k, v = inputs()
    for backend in ("reference", "gathered"):
        settings = {"block_size": BLOCK, "backend": backend}
        assert torch.equal(
            moba_attention(q, k, v, top_k=[3, 3, 3], **settings), moba_attention(q, k, v, top_k=3, **settings)
        )
    assert MOBA.with_blocks([3, 3, 3]) == (3, MOBA)


def test_auto_is_full_attention_where_the_smallest_covers():
    q, k, v = inputs()
    full = full_attention(q, k, v)
    assert torch.equal(moba_attention(q, k, v, block_size=BLOCK, top_k=[13, 20, 14]), full)
    assert not torch.allclose(moba_attention(q, k, v, block_size=BLOCK, top_k=[13, 20, 12]), full)


@EVERY_SELECTION
def test_traced(how):
    q, k, v = inputs()
    top_k, selection = Selection(**how).with_blocks(BUDGETS)
    settings = {"block_size": BLOCK, "softmax_scale": 8**-0.5, "max_seqlen": None}
    traced = traced_attention(
        q, k, v, BOUNDS, top_k=top_k, backend="gathered", selection=selection, workspace_bytes=None, **settings
    )
    called = moba_attention(q, k, v, BOUNDS, block_size=BLOCK, top_k=BUDGETS, backend="gathered", **how)
    torch.testing.assert_close(traced, called, rtol=0, atol=1e-12)


@EVERY_SELECTION
def test_decoding_equals_one_pass(how):
    q, k, v = inputs()
    whole = moba_attention(q, k, v, block_size=BLOCK, top_k=BUDGETS, backend="reference", **how)
    settings = {"block_size": BLOCK, "top_k": BUDGETS, "selection": Selection(**how)}
    for new in (1, 3, 29):
        torch.testing.assert_close(continue_text(q[-new:], k, v, **settings), whole[-new:], rtol=0, atol=1e-12)
    newest = decode_tokens(q[None, -1], k[None], v[None], **settings)
    torch.testing.assert_close(newest[0], whole[-1], rtol=0, atol=1e-12)


def test_pairs_are_the_mean_of_the_heads():
    mean = sum(attended_pairs(TOKENS, BLOCK, top_k) for top_k in BUDGETS) / 3
    assert float(attended_pairs(TOKENS, BLOCK, BUDGETS)) == pytest.approx(mean)
    assert attended_pairs(TOKENS, BLOCK, [3, 3]) == attended_pairs(TOKENS, BLOCK, 3)


@pytest.mark.parametrize(
    ("top_k", "message"),
    [
        ([2, 3], r"top_k = \[2, 3\] has 2 entries for 3 key heads: give one each"),
        ([2, 3, 0], r"top_k = \[2, 3, 0\]: give an integer of at least 1 for each key head"),
        ([2, 3, 1.5], "give an integer of at least 1"),
        ([], r"top_k = \[\]: give an integer"),
        ("3", "top_k must be an integer of at least 1, got '3'"),
    ],
)
def test_refusals_name_the_values(top_k, message):
    q, k, v = inputs()
    for call in (
        lambda: moba_attention(q, k, v, block_size=BLOCK, top_k=top_k),
        lambda: select_blocks(q, k, block_size=BLOCK, top_k=top_k),
        lambda: continue_text(q[-1:], k, v, block_size=BLOCK, top_k=top_k),
        lambda: decode_tokens(q[None, -1], k[None], v[None], block_size=BLOCK, top_k=top_k),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_flash_moba_refuses_them():
    q, k, v = inputs(torch.float32)
    from moba_megatron.ops.adapters import flash_moba_attention

    with pytest.raises(ValueError, match="selection by top_k with 2,5,1 blocks: only top_k of mean"):
        flash_moba_attention(
            q, k, v, None, block_size=128, top_k=5, softmax_scale=None, max_seqlen=None,
            selection=Selection(budgets=(2, 5, 1)),
        )  # fmt: skip
