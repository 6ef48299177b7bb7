"""A router over the kernels in Triton's interpreter: its choice, and its loss from the kernels' own log-sum-exps."""

import dataclasses

import pytest
import torch
from interpreted_fragments import SCALE, tasks_of
from kernel_examples import cu, inputs

from moba_megatron.ops import Router, gathered, moba_attention
from moba_megatron.ops import triton as kernels

BOUNDS = [0, 5, 60]


@pytest.mark.parametrize(("router_heads", "key_heads", "workspace_bytes"), [(2, 1, 3000), (4, 2, None)])
def test_loss_and_gradients_equal_the_definition(router_heads, key_heads, workspace_bytes):
    """In one pass and in many; heads of a size that is no power of two."""
    q, k, v, _ = inputs(60, 4, 2)
    found = []
    for backend in ("triton", "reference"):
        generator = torch.Generator().manual_seed(3)
        leaves = [
            torch.randn(60, heads, 6, generator=generator).requires_grad_() for heads in (router_heads, key_heads)
        ]
        router = Router(*leaves, "sparse", torch.arange(60) % 5 > 0)
        how = {"workspace_bytes": workspace_bytes} if backend == "triton" else {}
        out, got = moba_attention(q, k, v, cu(BOUNDS), block_size=8, top_k=4, backend=backend, router=router, **how)
        found.append([out, got.loss.detach(), got.entropy, got.tokens, *torch.autograd.grad(got.loss, leaves)])
    for ours, definition in zip(*found, strict=True):
        assert definition.abs().max() > 0
        torch.testing.assert_close(ours, definition.to(ours.dtype), rtol=1e-4, atol=1e-5)


def test_a_copy_of_q_and_k_gives_the_same_bits():
    q, k, v, _ = inputs(60, 4, 2)
    how = {"block_size": 8, "top_k": 3, "backend": "triton"}
    want = moba_attention(q, k, v, cu(BOUNDS), **how)
    assert torch.equal(moba_attention(q, k, v, cu(BOUNDS), router=Router(q, k), **how), want)
    assert torch.equal(moba_attention(q, k, v, cu(BOUNDS), router=Router(q, k, "sparse"), **how)[0], want)


@pytest.mark.parametrize(("rank", "block_size", "num_past"), [(0, 13, 2), (1, 8, 7)])
def test_blocks_of_a_rank_of_two(rank, block_size, num_past):
    """Log-sum-exps of chosen blocks whose keys lie on two ranks; also where rows have fewer blocks at hand than ids,
    and where their own block lies in part on the other rank."""
    q, _, tasks = tasks_of(rank, block_size, num_past)
    assert any(fragment.own_kv_block_T is not None for _, _, fragment in tasks) or block_size == 8
    assert block_size == 13 or any(kernels.on_device(task[2], q.device).gathers(num_past) for task in tasks)
    found = []
    for ops in (kernels, gathered):
        out, lse = torch.zeros(q.shape), torch.full(q.shape[:2], -torch.inf)
        block_lse = torch.full((*q.shape[:2], num_past), -torch.inf)
        for keys, ids, fragment in tasks:
            ops.accumulate(q, keys, ids, fragment, SCALE, out, lse, block_lse_TNK=block_lse)
        assert torch.equal(block_lse > -torch.inf, ids >= 0) and (ids >= 0).any()
        found.append((out, block_lse))
    for ours, portable in zip(*found, strict=True):
        torch.testing.assert_close(ours, portable, rtol=1e-5, atol=1e-5)
    every = [(keys, ids, dataclasses.replace(fragment, most_held=None)) for keys, ids, fragment in tasks]
    block_lse = torch.full_like(block_lse, -torch.inf)
    out, lse = torch.zeros(q.shape), torch.full(q.shape[:2], -torch.inf)
    for keys, ids, fragment in every:
        kernels.accumulate(q, keys, ids, fragment, SCALE, out, lse, block_lse_TNK=block_lse)
    assert torch.equal(block_lse, found[0][1])
