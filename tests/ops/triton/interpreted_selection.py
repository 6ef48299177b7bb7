"""Attention by the kernels over blocks chosen otherwise than by top-k of means, compared with the definition."""

import pytest
from kernel_examples import cu, inputs, results

from moba_megatron.ops import moba_attention
from moba_megatron.ops.selection import Selection

SELECTIONS = [Selection(summary="min_max"), Selection("recent")]


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_ids_of_the_portable_routing_reach_the_kernels(selection):
    tensors = inputs(60, 2, 1)
    settings = {"block_size": 8, "top_k": 3, **selection.settings}
    kernels, definition, plain = (
        results(lambda *x, s=s: moba_attention(*x, cu([0, 5, 60]), **s), *tensors)
        for s in (
            settings | {"backend": "triton"},
            settings | {"backend": "reference"},
            {"block_size": 8, "top_k": 3, "backend": "reference"},
        )
    )
    assert max(float((a - b).abs().max()) for a, b in zip(kernels, definition, strict=True)) <= 1e-5
    assert float((definition[0] - plain[0]).abs().max()) > 1e-2


@pytest.mark.parametrize("selector", ["top_k", "sink_recent"])
def test_key_heads_with_a_k_of_their_own(selector):
    tensors = inputs(60, 4, 2)
    settings = {"block_size": 8, "top_k": [2, 4], "selector": selector}
    kernels, definition = (
        results(lambda *x, b=backend: moba_attention(*x, cu([0, 5, 60]), backend=b, **settings), *tensors)
        for backend in ("triton", "reference")
    )
    assert max(float((a - b).abs().max()) for a, b in zip(kernels, definition, strict=True)) <= 1e-5
