"""Decoding in Triton's interpreter: token by token, it equals one pass over the whole text."""

import pytest
import torch
from kernel_examples import inputs, whole_numbers

from moba_megatron.ops import moba_attention
from moba_megatron.ops.decode import decode_tokens
from moba_megatron.ops.router import Router
from moba_megatron.ops.triton import complete_summaries, config, decode_cached
from moba_megatron.ops.triton.decode import SPLIT_KEYS, choose_cached


@pytest.mark.parametrize(("block_size", "top_k"), [(8, 3), (7, 1), (16, 2)])
def test_token_by_token_equals_one_pass(block_size, top_k):
    """Two sequences of different lengths in one batch; summaries are completed on the way."""
    lengths, room = (37, 21), 40
    texts = [inputs(length, 4, 2, seed=seed)[:3] for seed, length in enumerate(lengths)]
    want = [moba_attention(*x, block_size=block_size, top_k=top_k, backend="gathered") for x in texts]
    k, v = torch.full((2, 2, room, 2, 16), torch.nan)
    summaries = torch.full((2, room // block_size, 2, 16), torch.nan)
    for step in range(max(lengths)):
        now = torch.tensor([min(step, length - 1) for length in lengths])
        for sequence, (_, keys, values) in enumerate(texts):
            at = int(now[sequence])
            k[sequence, at], v[sequence, at] = keys[at], values[at]
        complete_summaries(k, summaries, now + 1, block_size)
        if step % 5 and step < max(lengths) - 1:
            continue
        q = torch.stack([text[0][at] for text, at in zip(texts, now.tolist(), strict=True)])
        out = decode_cached(q, k, v, summaries, now + 1, block_size=block_size, top_k=top_k, softmax_scale=0.25)
        expected = torch.stack([w[at] for w, at in zip(want, now.tolist(), strict=True)])
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_past", [1, 5])
def test_splits_of_the_blocks_choose_the_same(monkeypatch, num_past):
    """Whole numbers, so that ties abound: between splits too they go to the lower block. One text ends in the first
    split, one has no past block."""
    q, k = whole_numbers(3, 2, 1)[0], whole_numbers(3 * 50, 1, 1)[1].view(3, 50, 1, 16)
    lengths = torch.tensor([50 * 8 + 3, 4 * 8 + 1, 5])
    whole = choose_cached(q, k, lengths, 8, num_past + 1)
    monkeypatch.setattr(config, "LEAST_SPLIT", 7)
    assert config.decode_splits(3, 50) == (8, 7)
    assert torch.equal(choose_cached(q, k, lengths, 8, num_past + 1), whole)
    scores = torch.einsum("bnd,bmd->bnm", q, k[:, :, 0])
    for ids, score, length in zip(whole, scores, lengths, strict=True):
        own = int(length - 1) // 8
        want = score[:, :own].sort(dim=-1, descending=True, stable=True).indices[:, :num_past]
        assert torch.equal(ids[:, : want.shape[1]], want.to(torch.int32)) and (ids[:, -1] == own).all()
        assert (ids[:, want.shape[1] : -1] == -1).all()


def test_long_blocks_are_read_in_splits():
    block_size = SPLIT_KEYS + 100
    q, k, v, _ = inputs(2 * block_size + 30, 2, 1)
    want = moba_attention(q, k, v, block_size=block_size, top_k=2, backend="gathered")[-1:]
    summaries = k[: 2 * block_size].view(2, block_size, 1, 16).mean(dim=1)
    out = decode_cached(
        q[-1:], k[None], v[None], summaries[None], torch.tensor([q.shape[0]]),
        block_size=block_size, top_k=2, softmax_scale=0.25,
    )  # fmt: skip
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_caches(dtype):
    q, k, v, _ = inputs(50, 3, 1, size=24, dtype=dtype)
    want = moba_attention(*(x.float() for x in (q, k, v)), block_size=8, top_k=3, softmax_scale=0.25)[-1:]
    summaries = k[:48].float().view(6, 8, 1, 24).mean(dim=1)
    out = decode_cached(
        q[-1:], k[None], v[None], summaries[None], torch.tensor([50]), block_size=8, top_k=3, softmax_scale=0.25
    )
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), want, rtol=1e-2, atol=1e-2)


def test_too_many_blocks_are_refused():
    q, k, v, _ = inputs(70, 1, 1)
    with pytest.raises(ValueError, match="at most 64 past blocks per query, not 70"):
        decode_cached(
            q[-1:], k[None], v[None], k[None], torch.tensor([70]), block_size=1, top_k=100, softmax_scale=0.25
        )  # fmt: skip


def test_key_heads_with_a_k_of_their_own():
    q, k, v, _ = inputs(50, 4, 2)
    want = moba_attention(q, k, v, block_size=8, top_k=[2, 5], backend="gathered")[-1:]
    out = decode_tokens(q[-1:], k[None], v[None], block_size=8, top_k=[2, 5], backend="triton")
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("router_heads", "router_key_heads"), [(2, 1), (4, 2)])
def test_a_router_chooses(router_heads, router_key_heads):
    q, k, v, _ = inputs(50, 4, 2)
    generator = torch.Generator().manual_seed(3)
    router_q, router_k = (torch.randn(50, n, 8, generator=generator) for n in (router_heads, router_key_heads))
    router = Router(router_q, router_k)
    want = moba_attention(q, k, v, block_size=8, top_k=[2, 4], backend="reference", router=router)[-1:]
    out = decode_tokens(
        q[-1:], k[None], v[None], block_size=8, top_k=[2, 4], backend="triton", router_q_bHC=router_q[-1:],
        router_k_bSJC=router_k[None],
    )  # fmt: skip
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
