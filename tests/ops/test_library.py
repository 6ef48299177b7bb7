"""MoBA as PyTorch operators: compiled without graph breaks, on tensors without data, and counted."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from moba_megatron.ops import full_attention, library, moba_attention, select_blocks
from moba_megatron.ops.pairs import attended_pairs, chosen_blocks, scored_pairs

PACK = torch.tensor([0, 37, 37, 100], dtype=torch.int32)


def qkv(tokens=100, heads=4, kv_heads=2, size=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(tokens, h, size, generator=generator).to(dtype).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]


def moba(q, k, v, bounds=None, top_k=3):
    return moba_attention(q, k, v, bounds, block_size=8, top_k=top_k)


def with_gradients(attention, leaves, *arguments):
    out = attention(*leaves, *arguments)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_whole_and_computes_the_same_bits(dtype):
    compiled = torch.compile(moba, fullgraph=True, backend="aot_eager")
    for bounds in (None, PACK):
        leaves = qkv(dtype=dtype)
        for got, want in zip(
            with_gradients(compiled, leaves, bounds), with_gradients(moba, leaves, bounds), strict=True
        ):
            assert torch.equal(got, want)
    torch._dynamo.reset()


def test_compiled_code_checks_boundaries_when_it_runs():
    compiled = torch.compile(moba, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), pytest.raises(ValueError, match="60 is followed by 40 at 2"):
        compiled(*qkv(), torch.tensor([0, 60, 40, 100], dtype=torch.int32))
    torch._dynamo.reset()


@pytest.mark.parametrize("top_k", [3, 13])
def test_shapes_without_data(top_k):
    """With 13 blocks of 8 everything is attended, and full attention runs instead."""
    leaves = [x.detach().to("meta").requires_grad_() for x in qkv(dtype=torch.bfloat16)]
    for bounds in (None, PACK.to("meta")):
        out = moba(*leaves, bounds, top_k)
        gradients = torch.autograd.grad(out, leaves, torch.empty_like(out))
        for got, like in zip((out, *gradients), (leaves[0], *leaves), strict=True):
            assert (got.shape, got.dtype, got.device.type) == (like.shape, like.dtype, "meta")
    with FakeTensorMode():
        fake = [torch.empty(100, heads, 8) for heads in (4, 2, 2)]
        assert moba(*fake, torch.empty(4, dtype=torch.int32), top_k).shape == (100, 4, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_operators_keep_their_promises(dtype):
    q, k, v = qkv(dtype=dtype)
    for bounds in (None, PACK):
        settings = (bounds, 8, None, "gathered")
        ids = library.select_past_op(q.detach(), k.detach(), 2, *settings)
        assert torch.equal(ids, select_blocks(q, k, bounds, block_size=8, top_k=3)[..., 1:])
        torch.library.opcheck(library.select_past_op, (q.detach(), k.detach(), 2, *settings))
        torch.library.opcheck(library.attend_op, (q, k, v, ids, 0.25, *settings))
        out, lse = library.attend_op(q, k, v, ids, 0.25, *settings)
        assert out.requires_grad and not lse.requires_grad
        given = [x.detach() for x in (out, q, k, v, out, lse)]
        torch.library.opcheck(library.attend_backward_op, (*given, ids, 0.25, *settings))


def test_operations_are_counted_by_pairs():
    leaves = [x.detach().to("meta").requires_grad_() for x in qkv()]
    with FlopCounterMode(display=False) as counter:
        moba(*leaves).sum().backward()
    pairs = 4 * 8 * attended_pairs(100, 8, 3)
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    assert counts == {
        "moba_megatron.select_past": 2 * 4 * 8 * scored_pairs(100, 8),
        "moba_megatron.attend": 4 * pairs,
        "moba_megatron.attend_backward": 10 * pairs,
    }


def test_counters_listen_to_kernels_that_pytorch_does_not_see():
    q, _, _ = qkv()
    assert not library.is_traced(q, "triton") and not library.is_traced(q.detach(), "gathered")
    with FlopCounterMode(display=False):
        assert library.is_traced(q, "triton") and not library.is_traced(q, "gathered")
    assert library.is_traced(q.to("meta"), "gathered")


def test_counted_pairs_bound_what_an_eager_call_computes(monkeypatch):
    """Forward in fp32: masked scores of own blocks come on top, nothing else but room in batches of rows."""
    monkeypatch.setattr("moba_megatron.ops.gathered.index.ROWS_OF_BATCH", 1)
    leaves = [x.detach() for x in qkv(tokens=96)]
    with FlopCounterMode(display=False) as counter:
        moba(*leaves)
    bound = 4 * 8 * (4 * attended_pairs(96, 8, 3) + 2 * scored_pairs(96, 8))
    own_blocks = 4 * 4 * 8 * 96 * 8
    assert bound <= counter.get_total_flops() <= bound + own_blocks + 2 * 4 * 8 * 96 * 12


@pytest.mark.parametrize(
    ("length", "block_size", "top_k"), [(64, 8, 3), (67, 8, 3), (99, 16, 1), (30, 8, 9), (5, 8, 2)]
)
def test_blocks_are_counted_one_by_one(length, block_size, top_k):
    past = [t // block_size for t in range(length)]
    assert scored_pairs(length, block_size) == sum(past)
    assert chosen_blocks(length, block_size, top_k) == sum(min(top_k - 1, blocks) for blocks in past)


def test_full_attention_of_one_document_compiles():
    compiled = torch.compile(full_attention, fullgraph=True, backend="aot_eager")
    q, k, v = (x.detach() for x in qkv())
    torch.testing.assert_close(compiled(q, k, v), full_attention(q, k, v))
    torch._dynamo.reset()
