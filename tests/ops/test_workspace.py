"""The workspace of the operator: a small one costs passes and not results; what cannot be kept to one says so."""

import doctest

import pytest
import torch
import workspace_formula

from moba_megatron.benchmark.calls import peak_bytes
from moba_megatron.ops import moba_attention

SETTINGS = {"block_size": 16, "top_k": 9}


def qkv(tokens, heads=4, kv_heads=2, size=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, h, size, generator=generator).requires_grad_() for h in (heads, kv_heads, kv_heads)]


def with_gradients(leaves, attention=moba_attention, **settings):
    out = attention(*leaves, torch.tensor([0, 100, 300], dtype=torch.int32), **SETTINGS, **settings)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("workspace", [1, 20_000, 10**9])
def test_any_workspace_gives_the_same_attention(workspace):
    """Down to one token of one head at a time, and up to all heads of a key head at once."""
    leaves = qkv(300)
    want = with_gradients(leaves)
    for got, expected in zip(with_gradients(leaves, workspace_bytes=workspace), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_compiled_code_keeps_to_it():
    leaves = qkv(300)
    compiled = torch.compile(moba_attention, fullgraph=True, backend="aot_eager")
    want = with_gradients(leaves, workspace_bytes=20_000)
    for got, expected in zip(with_gradients(leaves, compiled, workspace_bytes=20_000), want, strict=True):
        assert torch.equal(got, expected)
    torch._dynamo.reset()


def test_a_small_workspace_holds_less():
    q, k, v = (x.detach() for x in qkv(4096, heads=2, kv_heads=1))
    held = {
        room: peak_bytes(lambda r=room: moba_attention(q, k, v, **SETTINGS, workspace_bytes=r), "cpu")
        for room in (2**18, 2**24)
    }
    entries = 2 * 4096 * 8 * (16 * 4 + 40)
    assert 2**18 < entries < 2**24
    assert held[2**24] - held[2**18] >= (entries - 2**18) // 2


@pytest.mark.parametrize("workspace", [0, -1, 1.5, True])
def test_what_is_no_workspace_is_refused(workspace):
    with pytest.raises(ValueError, match=f"workspace_bytes must be an integer of at least 1, got {workspace}"):
        moba_attention(*qkv(20), **SETTINGS, workspace_bytes=workspace)


def test_a_dense_backend_cannot_be_kept_to_one():
    with pytest.raises(ValueError, match="workspace_bytes = 4096: backend 'reference' cannot.*triton or gathered"):
        moba_attention(*qkv(20), **SETTINGS, backend="reference", workspace_bytes=4096)


def test_the_formula_has_an_example():
    outcome = doctest.testmod(workspace_formula)
    assert outcome.attempted == 1 and outcome.failed == 0
