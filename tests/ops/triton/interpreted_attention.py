"""Attention over whole packs in Triton's interpreter: forward, backward, passes, determinism."""

import dataclasses
import math

import pytest
import torch
from kernel_examples import assert_as_good, cu, inputs, results
from workspace_formula import workspace_bounds

from moba_megatron.benchmark.calls import peak_bytes
from moba_megatron.ops import moba_attention
from moba_megatron.ops.fragments import Keys
from moba_megatron.ops.layout import block_layout
from moba_megatron.ops.reference import reference_attend, reference_select
from moba_megatron.ops.triton import attend, attend_backward, attend_forward, config, select_past, summarize
from moba_megatron.ops.triton.fragments import whole_pack
from moba_megatron.ops.triton.passes import forward_entry_bytes, passes

PACKS = {
    "tail": ((0, 139), 32, 3),
    "uneven, an empty document": ((0, 5, 5, 68, 150, 151), 16, 3),
    "blocks of 24": ((0, 63, 100), 24, 3),
    "top 1": ((0, 37, 70), 16, 1),
    "long blocks": ((0, 140, 155), 70, 2),
}


def compare(pack, num_heads, num_kv_heads, size, dtype, seed=0):
    """Kernels and reference with the same ids, against fp64."""
    bounds, block_size, top_k = pack
    bounds = cu(bounds)
    q, k, v, do = inputs(int(bounds[-1]), num_heads, num_kv_heads, size, dtype, seed)
    layout = block_layout(q.shape[0], block_size, bounds)
    ids = reference_select(q, k, bounds, block_size, top_k - 1)
    scale = 1 / math.sqrt(size)
    got = results(lambda *x: attend(*x, ids, layout, scale)[0], q, k, v, do)
    wide = [x.double() for x in (q, k, v, do)]
    want = results(lambda *x: reference_attend(*x, ids, bounds, block_size, scale)[0], *wide)
    assert_as_good(got, want, plain_results(q, k, v, do, ids, layout, scale), dtype)
    lse = attend_forward(q, k, v, ids, layout, scale)[1]
    want_lse = reference_attend(*wide[:3], ids, bounds, block_size, scale)[1]
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)


def plain_results(q, k, v, do, ids, layout, scale):
    """What one would write in the inputs' own dtype: the yardstick of the tolerance."""
    position, repeat = torch.arange(q.shape[0]), q.shape[1] // k.shape[1]
    own = (layout.pack_block_T[:, None] == layout.pack_block_T) & (position[:, None] >= position)
    chosen = (ids[..., None] == layout.block_T).any(2) & (layout.document_T[:, None] == layout.document_T)[:, None]

    def attention(q, k, v):
        scores = torch.einsum("tnd,snd->nts", q, k.repeat_interleave(repeat, 1)) * scale
        scores = scores.masked_fill(~(own | chosen.transpose(0, 1)), -torch.inf)
        return torch.einsum("nts,snd->tnd", scores.softmax(-1), v.repeat_interleave(repeat, 1))

    return results(attention, q, k, v, do)


@pytest.mark.parametrize("pack", PACKS)
def test_equals_reference(pack):
    compare(PACKS[pack], 4, 2, 16, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_as_good_as_plain_pytorch(dtype):
    compare(PACKS["uneven, an empty document"], 4, 2, 32, dtype)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (5, 1), (6, 2)])
def test_any_number_of_query_heads_per_kv_head(num_heads, num_kv_heads):
    compare(((0, 30, 90), 16, 3), num_heads, num_kv_heads, 16, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("num_heads", [24, 150])
def test_many_query_heads_per_kv_head(num_heads):
    compare(((0, 30, 90), 16, 3), num_heads, 1, 16, torch.float32)


@pytest.mark.parametrize("size", [24, 96])
def test_head_sizes_that_are_no_power_of_two(size):
    compare(((0, 70), 16, 3), 2, 1, size, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [64, 128, 192, 256])
def test_all_head_sizes(size, dtype):
    compare(((0, 90, 330), 64, 3), 4, 2, size, dtype)
    compare(((0, 600), 200, 2), 2, 1, size, dtype)


def test_passes_do_not_show():
    """Workspaces for one key head, and for a few tokens of one: the same attention and gradients."""
    bounds, block_size, num_past = cu([0, 25, 60]), 8, 3
    q, k, v, do = inputs(60, 4, 2)
    layout, per_token = block_layout(60, block_size, bounds), 2 * num_past * forward_entry_bytes(q)

    def attention(workspace):
        settings = {"block_size": block_size, "top_k": num_past + 1, "backend": "triton"}
        return results(lambda *x: moba_attention(*x, bounds, **settings, workspace_bytes=workspace), q, k, v, do)

    whole = attention(None)
    # Room for 17 tokens makes four passes a kv head, of 15 each.
    for heads_at_once, room, tokens in ((1, 60, 60), (1, 17, 15)):
        workspace = heads_at_once * room * per_token
        cut = list(passes(q, Keys(k, v, 2), num_past, whole_pack(layout), forward_entry_bytes(q), workspace))
        assert len(cut) == -(-60 // tokens) * 2
        assert {(w.num_kv_heads, w.num_tokens) for w in cut} >= {(heads_at_once, tokens)}
        for a, b in zip(whole, attention(workspace), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_memory_keeps_to_its_formula():
    """What the docstring of the module promises, under a workspace for a few tokens of one key head."""
    tokens, block_size, top_k, workspace = 192, 16, 9, 60_000
    q, k, v, do = inputs(tokens, 4, 2)
    layout = block_layout(tokens, block_size)
    ids = select_past(q, summarize(k, layout), layout, top_k - 1)
    saved = []
    forward = peak_bytes(lambda: saved.extend(attend_forward(q, k, v, ids, layout, 0.25, workspace)), "cpu")
    backward = peak_bytes(lambda: attend_backward(do, q, k, v, *saved, ids, layout, 0.25, workspace), "cpu")
    forward_bound, backward_bound = workspace_bounds(tokens, 4, 2, 16, 4, block_size, top_k, workspace)
    results_forward = q.nbytes + saved[1].nbytes
    results_backward = q.nbytes + k.nbytes + v.nbytes + saved[1].nbytes  # delta is as large as lse
    assert 0.3 * workspace < forward - results_forward <= forward_bound
    assert 0.3 * workspace < backward - results_backward <= backward_bound


def test_hot_block_is_cut_and_summed_in_order(monkeypatch):
    """All queries choose the first block: its entries are cut into splits, whose sums are added in order."""
    monkeypatch.setattr(config, "SPLIT_ENTRIES", 16)
    q, k, v, do = inputs(60, 2, 1)
    layout = block_layout(60, 4)
    ids = torch.where(layout.block_T > 0, 0, -1).view(-1, 1, 1).expand(-1, 2, 1).to(torch.int32)
    got = results(lambda *x: attend(*x, ids, layout, 0.25)[0], q, k, v, do)
    again = results(lambda *x: attend(*x, ids, layout, 0.25)[0], q, k, v, do)
    want = results(lambda *x: reference_attend(*x, ids, None, 4, 0.25)[0], q, k, v, do)
    for a, b, c in zip(got, again, want, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)])
def test_sums_of_hot_blocks_have_two_levels(monkeypatch, group):
    """Two blocks side by side that all later queries choose, and the others rarely: groups of their splits begin and
    end anywhere among the windows of `add_groups`."""
    monkeypatch.setattr(config, "SPLIT_ENTRIES", 16)
    q, k, v, do = inputs(100, 2, 1)
    layout = block_layout(100, 4)
    rare = torch.where(layout.block_T % 5 == 4, layout.block_T - 1, 1)
    chosen = torch.stack([torch.zeros_like(rare), rare], dim=1)
    ids = torch.where(chosen < layout.block_T[:, None], chosen, -1)
    ids = ids.view(100, 1, 2).expand(-1, 2, -1).to(torch.int32).contiguous()
    once = results(lambda *x: attend(*x, ids, layout, 0.25)[0], q, k, v, do)
    monkeypatch.setattr(config, "ADD_AT_ONCE", group)
    got, again = (results(lambda *x: attend(*x, ids, layout, 0.25)[0], q, k, v, do) for _ in range(2))
    want = results(lambda *x: reference_attend(*x, ids, None, 4, 0.25)[0], q, k, v, do)
    assert torch.equal(got[0], once[0]) and torch.equal(got[1], once[1])
    for a, b, c in zip(got, again, want, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)


def test_given_ids_any_order_and_holes():
    q, k, v, _ = inputs(64, 2, 1)
    layout = block_layout(64, 8)
    ids = reference_select(q, k, None, 8, 3)
    ids[:, :, 1].masked_fill_(torch.arange(64)[:, None] % 3 == 0, -1)
    want_out, want_lse = reference_attend(q, k, v, ids, None, 8, 0.25)
    out, lse = attend_forward(q, k, v, ids[..., [2, 0, 1]], layout, 0.25)
    torch.testing.assert_close(out, want_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)


def test_strides_of_the_inputs():
    """Views into a fused projection, whose heads lie apart, and keys whose last dimension is not contiguous."""
    q, k, v, do = inputs(50, 2, 1)
    layout = block_layout(50, 8)
    ids = reference_select(q, k, None, 8, 2)
    want = attend_forward(q, k, v, ids, layout, 0.25)[0]
    fused = torch.cat([q, k, v], dim=1).split([2, 1, 1], dim=1)
    turned = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (q, k, v)]
    for views in (fused, turned, (q, fused[1], turned[2])):
        assert torch.equal(attend_forward(*views, ids, layout, 0.25)[0], want)


def test_unused_block_numbers():
    """Where boundaries live on a device the number of blocks is an upper bound: unused ones are empty."""
    bounds = cu([0, 20, 50])
    q, k, v, do = inputs(50, 2, 1)
    layout = block_layout(50, 8, bounds)
    loose = dataclasses.replace(layout, num_blocks=layout.num_blocks + 5)
    ids = reference_select(q, k, bounds, 8, 2)
    exact, same = (results(lambda *x, y=y: attend(*x, ids, y, 0.25)[0], q, k, v, do) for y in (layout, loose))
    assert all(torch.equal(a, b) for a, b in zip(exact, same, strict=True))


def test_the_public_operator():
    q, k, v, do = inputs(100, 4, 2)
    bounds = cu([0, 33, 100])
    got, want = (
        results(lambda *x, b=b: moba_attention(*x, bounds, block_size=16, top_k=3, backend=b), q, k, v, do)
        for b in ("triton", "gathered")
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_scale_zero():
    q, k, v, _ = inputs(40, 2, 1)
    zero = moba_attention(q, k, v, block_size=8, top_k=2, softmax_scale=0.0, backend="triton")
    want = moba_attention(q, k, v, block_size=8, top_k=2, softmax_scale=0.0, backend="gathered")
    torch.testing.assert_close(zero, want, rtol=1e-5, atol=1e-5)
