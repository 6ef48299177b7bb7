"""Continuing a text equals one pass over it, by the definition."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch

from moba_megatron.benchmark.calls import peak_bytes
from moba_megatron.ops.decode import block_means, block_summaries, continue_text, decode_tokens
from moba_megatron.ops.gathered.decode import ONE_BY_ONE
from moba_megatron.ops.reference import reference_attend, reference_select
from moba_megatron.ops.selection import Selection


def text(length, heads=4, kv_heads=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(length, h, 8, generator=generator).to(dtype) for h in (heads, kv_heads, kv_heads)]


def by_definition(q, k, v, block_size, top_k):
    return reference_attend(q, k, v, reference_select(q, k, None, block_size, top_k - 1), None, block_size, 8**-0.5)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [64, 2**20], ids=["moba", "full"])
def test_memory_of_a_piece_does_not_grow_with_what_is_before_it(block_size, dtype, monkeypatch):
    """Keys of a cache with room ahead, heads first, as it holds them. Only scores of blocks grow with the length."""
    monkeypatch.setattr("moba_megatron.ops.gathered.decode.LONGEST_PART", 1024)
    new, peaks = 48, []
    store = torch.randn(2, 2, 50000, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    for length in (20512, 41024):
        k, v = store[:, :, :length].transpose(1, 2)
        q = torch.randn(new, 4, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
        means = block_means(k, block_size)
        settings = {"block_size": block_size, "top_k": 3 if block_size < length else 1}
        peaks.append(peak_bytes(lambda q=q, k=k, v=v, m=means, s=settings: continue_text(q, k, v, m, **s), "cpu"))
    added = (41024 - 20512) * 2 * 2 * 32 * dtype.itemsize
    assert peaks[1] - peaks[0] < added / 3, peaks


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 1), (4, 4), (6, 2)])
def test_any_end_of_a_text(heads, kv_heads):
    for length, block_size, top_k in itertools.product((1, 7, 33, 64), (1, 7, 8, 16, 200), (1, 3, 50)):
        q, k, v = text(length, heads, kv_heads)
        want = by_definition(q, k, v, block_size, top_k)
        for new in {1, min(length, ONE_BY_ONE), min(length, 9), min(length, 20), length}:
            got = continue_text(q[length - new :], k, v, block_size=block_size, top_k=top_k)
            torch.testing.assert_close(got, want[length - new :], rtol=1e-12, atol=1e-12)


def test_given_summaries_and_texts_side_by_side():
    """Summaries made bit by bit, with room behind them; keys laid out with heads first."""
    texts = [text(50), [x + 1 for x in text(50)]]
    q, k, v = (torch.stack(parts) for parts in zip(*texts, strict=True))
    means = torch.full((2, 9, 2, 8), torch.nan, dtype=torch.float64)
    for row in range(2):
        means[row, :3] = block_means(k[row, :25], 8)
        means[row, 3:6] = block_means(k[row], 8, first_block=3)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    got = decode_tokens(q[:, -1], k, v, means, block_size=8, top_k=3)
    assert torch.equal(got, decode_tokens(q[:, -1], k, v, block_size=8, top_k=3))
    for row, parts in enumerate(texts):
        torch.testing.assert_close(got[row], by_definition(*parts, 8, 3)[-1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "selection",
    [
        Selection("recent"),
        Selection("sink_recent"),
        Selection(summary="min_max"),
        Selection("threshold", threshold=0.6),
        Selection("threshold", "min_max", 0.6),
        Selection(share_selection="mean"),
    ],
    ids=str,
)
def test_every_selection_at_any_end_of_a_text(selection):
    for length, block_size, top_k in itertools.product((33, 64), (7, 16, 200), (1, 2, 3, 50)):
        q, k, v = text(length)
        ids = reference_select(q, k, None, block_size, top_k - 1, selection)
        want = reference_attend(q, k, v, ids, None, block_size, 8**-0.5)[0]
        for new in (1, 3, 20, length):
            got = continue_text(q[length - new :], k, v, block_size=block_size, top_k=top_k, selection=selection)
            torch.testing.assert_close(got, want[length - new :], rtol=1e-12, atol=1e-12)
        got = decode_tokens(q[None, -1], k[None], v[None], block_size=block_size, top_k=top_k, selection=selection)
        torch.testing.assert_close(got[0], want[-1], rtol=1e-12, atol=1e-12)
        if selection.uses_scores:
            # Summaries made bit by bit.
            parts = [block_summaries(k[: length // 2], block_size, selection=selection)]
            parts.append(block_summaries(k, block_size, len(parts[0]), selection))
            sizes = {"block_size": block_size, "top_k": top_k, "selection": selection}
            torch.testing.assert_close(continue_text(q[-1:], k, v, torch.cat(parts), **sizes)[0], want[-1])


def test_ties_go_to_the_lower_block():
    q, k, v = text(24)
    k = torch.ones_like(k)
    for new in (1, 20):
        got = continue_text(q[24 - new :], k, v, block_size=4, top_k=2)
        torch.testing.assert_close(got, by_definition(q, k, v, 4, 2)[24 - new :])


def test_the_kernels_give_the_same():
    """In Triton's interpreter, in a process of its own, because Triton decides for it when it is imported."""
    code = """
import torch
from moba_megatron.ops.decode import decode_tokens
q, k, v = torch.randn(2, 4, 16), torch.randn(2, 2, 50, 16).transpose(1, 2), torch.randn(2, 2, 50, 16).transpose(1, 2)
settings = {"block_size": 8, "top_k": 3}
got = decode_tokens(q, k, v, backend="triton", **settings)
torch.testing.assert_close(got, decode_tokens(q, k, v, backend="gathered", **settings), rtol=1e-5, atol=1e-5)
"""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("new", [1, 20])
def test_16_bit(new):
    q, k, v = text(40, dtype=torch.bfloat16)
    got = continue_text(q[40 - new :], k, v, block_size=8, top_k=3)
    want = by_definition(q.double(), k.double(), v.double(), 8, 3)[40 - new :]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)


def test_a_step_reads_the_chosen_blocks_only():
    """Keys and values of refused blocks may be anything once their summaries are known."""
    q, k, v = text(50, heads=1, kv_heads=1)
    means = block_means(k, 8)
    chosen = reference_select(q, k, None, 8, 2)[-1, 0].tolist()
    refused = torch.ones(50, dtype=torch.bool)
    refused[48:] = False
    for block in chosen:
        refused[block * 8 : block * 8 + 8] = False
    assert refused.sum() == 32
    want = continue_text(q[-1:], k, v, means, block_size=8, top_k=3)
    k[refused], v[refused] = torch.nan, torch.nan
    assert torch.equal(continue_text(q[-1:], k, v, means, block_size=8, top_k=3), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_tND": torch.zeros(0, 4, 8)}, "0 < t <= S"),
        ({"q_tND": torch.zeros(21, 4, 8)}, r"q \(21, 4, 8\)"),
        ({"q_tND": torch.zeros(1, 3, 8)}, r"q \(1, 3, 8\)"),
        ({"v_SGD": torch.zeros(19, 2, 8)}, r"v \(19, 2, 8\)"),
        ({"top_k": 0}, "top_k.*0"),
    ],
)
def test_refusals_name_the_values(change, message):
    q, k, v = text(20)
    arguments = {"q_tND": q[-1:], "k_SGD": k, "v_SGD": v, "block_size": 4, "top_k": 2} | change
    with pytest.raises(ValueError, match=message):
        continue_text(**arguments)
