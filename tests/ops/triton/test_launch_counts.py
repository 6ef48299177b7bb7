"""How many kernels a layer starts, PyTorch's own included: at about 5 microseconds each they are what a short sequence
costs. Counted on tensors without data."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

triton = pytest.importorskip("triton")

from launch_counts import Operations, layer_launches  # noqa: E402
from without_data import kernels_on_meta  # noqa: E402

import moba_megatron.ops.triton as kernels  # noqa: E402
from moba_megatron.ops import moba_attention  # noqa: E402
from moba_megatron.ops.fragments import Fragment, Keys  # noqa: E402
from moba_megatron.ops.kept_layouts import equal_boundaries, layout_of, stays_as_it_is  # noqa: E402
from moba_megatron.planning.kernel_model import AttentionSizes, backward_work, forward_work  # noqa: E402

K = 2**10
# Tokens; block size, top_k; passes forward and backward; launches of all but routing.
REACHED = [
    (8 * K, (64, 16), (1, 1), 23),
    (8 * K, (128, 8), (1, 1), 23),
    (8 * K, (512, 3), (1, 1), 24),
    (8 * K, (2048, 3), (1, 1), 24),
    (8 * K, (4096, 12), (1, 1), 24),
    (32 * K, (64, 16), (2, 4), 57),
    (128 * K, (64, 16), (8, 16), 193),
    (128 * K, (128, 8), (4, 8), 105),
    (128 * K, (512, 3), (2, 3), 51),
    (128 * K, (2048, 3), (2, 3), 48),
    (128 * K, (4096, 12), (8, 16), 193),
]


@pytest.fixture
def launches(monkeypatch):
    return kernels_on_meta(monkeypatch)


@pytest.fixture
def counted(launches):
    """Calls a function and returns what it returns, and its launches by name."""

    def count(call):
        launches.clear()
        with Operations() as operations:
            result = call()
        return result, Counter(name for name, _ in launches) + operations.found

    return count


def tensors(tokens, heads=32, kv_heads=8, size=128):
    return [torch.empty(tokens, n, size, dtype=torch.bfloat16, device="meta") for n in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize(("tokens", "setting", "passes", "reached"), REACHED)
def test_launches_of_a_layer(launches, tokens, setting, passes, reached):
    """At most 60 with one pass in each direction, and 8 for each further one. The first layer of a microbatch: it also
    lays out the blocks."""
    block_size, top_k = setting
    made, routing, forward, backward = layer_launches(launches, tokens, block_size, top_k).values()
    assert (forward["causal_fwd"], backward["causal_dq"]) == passes
    attention = made + forward + backward
    assert attention.total() + routing.total() <= 60 + 8 * (sum(passes) - 2), (attention, routing)
    assert attention.total() <= reached, attention
    # Nothing of PyTorch's is left in a pass, and an index takes three launches beside its splits.
    index = {"count_entries", "rank_chunks", "scatter_entries", "split_entries"}
    for found, count in ((forward, passes[0]), (backward, passes[1])):
        assert all(found[name] == count for name in index)
        assert not any(name.startswith("aten.") for name in found), found
    expected = AttentionSizes(tokens, 32, 8, 128, block_size, top_k)
    for found, works in ((forward, forward_work(expected)[2:]), (backward, backward_work(expected))):
        beside = found["split_spans"] + found["add_groups"]
        assert found.total() - beside == sum(work.launches for work in works)


@pytest.mark.parametrize("documents", [None, 6])
def test_layers_of_a_microbatch_share_their_layout(counted, documents):
    bounds = None if documents is None else torch.empty(documents, dtype=torch.int32, device="meta")
    if bounds is not None:
        stays_as_it_is(bounds)
    # A length that no other test has.
    leaves = [x.requires_grad_() for x in tensors(4096 + 64 * (documents or 1))]

    def layer():
        out = moba_attention(*leaves, bounds, block_size=64, top_k=4, backend="triton")
        return torch.autograd.grad(out, leaves, torch.empty_like(out))

    (_, first), (_, second) = counted(layer), counted(layer)
    saved = first - second
    assert saved["split_spans"] == 2 and saved["aten.arange"] and "split_spans" not in second
    # Attention forward and backward, and routing.
    assert second.total() <= 6 + 9 + 25, second


def test_what_layers_share_is_not_shared_with_others():
    q = torch.empty(64, 1, 16, device="meta")
    bounds = torch.zeros(3, dtype=torch.int32, device="meta")
    # Until somebody says that it does not change, a tensor may.
    assert layout_of(q, bounds, 16, None) is not layout_of(q, bounds, 16, None)
    stays_as_it_is(bounds)
    layout = layout_of(q, bounds, 16, None)
    assert layout_of(q, bounds, 16, None) is layout
    assert layout_of(q, bounds, 16, 50) is not layout and layout_of(q, bounds, 8, None) is not layout
    assert layout_of(q, bounds.clone(), 16, None) is not layout
    bounds += 1
    changed = layout_of(q, bounds, 16, None)
    assert changed is not layout and layout_of(q, bounds, 16, None) is changed
    one = layout_of(q, None, 16, None)
    assert layout_of(q, None, 16, None) is one is not layout_of(q[:32], None, 16, None)
    # On the host values are read, and nothing is launched.
    host = torch.tensor([0, 30, 64])
    assert layout_of(torch.empty(64, 1, 16), host, 16, None) is not layout_of(torch.empty(64, 1, 16), host, 16, None)
    assert equal_boundaries(2, 8, q.device) is equal_boundaries(2, 8, q.device)
    with torch.inference_mode():
        assert layout_of(q, None, 16, None) is not one


def test_a_step_of_a_ring(counted):
    """One shard of keys, once it has been laid out: a causal half, chosen blocks and the query's own block."""
    q, k, v = tensors(4096)
    own = torch.empty(4096, dtype=torch.int32, device="meta")
    fragment = Fragment([(i * 64, i * 64 + 64) for i in range(64)], [(0, 64, 64)], own, own, own)
    ids = torch.empty(4096, 32, 15, dtype=torch.int32, device="meta")
    out, lse = torch.empty_like(q, dtype=torch.float32), torch.empty(4096, 32, device="meta")

    def step():
        kernels.accumulate(q, Keys(k, v, 4), ids, fragment, 1.0, out, lse)

    def back():
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        kernels.accumulate_backward(q, q, Keys(k, v, 4), ids, fragment, 1.0, None, lse, lse, out, dk, dv)

    for call, most in ((step, 7), (back, 12)):
        counted(call)
        _, launches = counted(call)
        assert launches.total() <= most, launches
