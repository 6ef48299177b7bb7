"""Sizes of launches at a million tokens, on tensors without data: the host's own code runs, kernels only tell their
grids. A GPU starts at most 2^31 - 1 programs on the first axis of a grid and 65,535 on the others."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from without_data import record_launches  # noqa: E402

import moba_megatron.ops.triton as kernels  # noqa: E402
from moba_megatron.ops.fragments import Keys  # noqa: E402
from moba_megatron.ops.layout import block_layout  # noqa: E402
from moba_megatron.ops.triton import config  # noqa: E402
from moba_megatron.ops.triton.fragments import DeviceFragment, Spans  # noqa: E402

TOKENS = 2**20
# Room for passes as large as the numbers of their entries allow, which is what makes launches large.
WORKSPACE = 2**50
SETTINGS = [(16, 64), (64, 16), (128, 8), (512, 3), (4096, 12)]


@pytest.fixture
def launches(monkeypatch):
    """(kernel, grid) of every launch, in order."""
    return record_launches(monkeypatch)


def check(launches):
    names = {name for name, _ in launches}
    for name, (first, *others) in launches:
        assert 0 < first < 2**31 and all(0 < count <= 65_535 for count in others), (name, first, others)
    launches.clear()
    return names


def tensors(dtype, size, heads=32, kv_heads=8):
    return [torch.empty(TOKENS, n, size, dtype=dtype, device="meta") for n in (heads, kv_heads, kv_heads, heads)]


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 128), (torch.float32, 256)])
def test_a_million_tokens(launches, monkeypatch, architecture, dtype, size):
    monkeypatch.setattr(config, "architecture_of", lambda tensor: architecture)
    q, k, v, do = tensors(dtype, size)
    documents = torch.empty(4097, dtype=torch.int32, device="meta")
    seen = set()
    for block_size, top_k in SETTINGS:
        for bounds in (None, documents):
            layout = block_layout(TOKENS, block_size, bounds, device="meta")
            ids = kernels.select_past(q, kernels.summarize(k, layout), layout, top_k - 1)
            out, lse = kernels.attend_forward(q, k, v, ids, layout, 1.0, WORKSPACE)
            kernels.attend_backward(do, q, k, v, out, lse, ids, layout, 1.0, WORKSPACE)
            seen |= check(launches)
    assert seen >= {"route", "past_fwd_short", "past_fwd_long", "past_dkdv", "past_dq", "causal_dq"}
    assert ("screen" in seen) == (dtype == torch.bfloat16)


def test_screening_adds_two_launches_for_the_means_and_one_for_itself(launches):
    """And only where it is worth it; one launch writes all planes."""
    q, k, _, _ = tensors(torch.bfloat16, 128)
    for block_size, past, screened in ((64, 15, True), (128, 7, True), (512, 2, True), (4096, 11, False)):
        layout = block_layout(TOKENS, block_size, device="meta")
        kernels.select_past(q, kernels.summarize(k, layout), layout, past)
        names = [name for name, _ in launches]
        launches.clear()
        screening = ["average_means", "centre_means", "screen"] if screened else []
        assert names == ["block_means", *screening, "split_means", "route"]


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 256), (torch.float32, 256)])
def test_full_attention_of_a_fragment(launches, monkeypatch, architecture, dtype, size):
    """One document of all tokens: one kv block of the keys of another rank, one causal span of the rank's own. Sums
    have tiles of 16 keys at this head size, more than one axis holds."""
    monkeypatch.setattr(config, "architecture_of", lambda tensor: architecture)
    q, k, v, do = tensors(dtype, size)
    keys, out = Keys(k, v, 4), torch.empty_like(q, dtype=torch.float32)
    lse = torch.empty(q.shape[:2], device="meta")
    none = torch.empty(*q.shape[:2], 0, dtype=torch.int32, device="meta")
    bound = torch.empty(1, dtype=torch.int64, device="meta")
    whole, nothing = Spans(bound, bound, TOKENS, TOKENS), Spans(bound[:0], bound[:0], 0, 0)
    own_kv_block = torch.empty(TOKENS, dtype=torch.int32, device="meta")
    for fragment in (DeviceFragment(whole, nothing, own_kv_block_T=own_kv_block), DeviceFragment(nothing, whole)):
        kernels.accumulate(q, keys, none, fragment, 1.0, out, lse, WORKSPACE)
        kernels.accumulate_backward(
            do, q, keys, none, fragment, 1.0, None, lse, lse, torch.empty_like(out), torch.empty_like(k),
            torch.empty_like(v), WORKSPACE,
        )  # fmt: skip
    tiles = TOKENS // config.tiles("past_dkdv", dtype, size, TOKENS, architecture)["BLOCK_N"]
    grids = dict(launches)
    assert grids["past_dkdv"][0] == tiles and grids["combine_dkdv"][1:] == (32_768, 2)
    assert check(launches) >= {"past_fwd_long", "combine_out", "past_dkdv", "combine_dkdv", "past_dq", "combine_dq"}


@pytest.mark.parametrize(("sequences", "block_size"), [(1, 16), (1, 4096), (70_000, 64)])
def test_decoding(launches, sequences, block_size):
    room = TOKENS if sequences == 1 else 256
    q = torch.empty(sequences, 32, 128, dtype=torch.bfloat16, device="meta")
    k = torch.empty(sequences, room, 8, 128, dtype=torch.bfloat16, device="meta")
    summaries = torch.empty(sequences, room // block_size, 8, 128, device="meta")
    lengths = torch.empty(sequences, dtype=torch.int32, device="meta")
    kernels.decode_cached(q, k, k, summaries, lengths, block_size=block_size, top_k=65, softmax_scale=1.0)
    kernels.complete_summaries(k, summaries, lengths, block_size)
    programs = {name: grid for name, grid in launches}["route"]
    assert programs[2] == (32 if (sequences, block_size) == (1, 16) else 1)
    assert check(launches) == {"route", "decode_fwd", "combine_out", "block_means"}
