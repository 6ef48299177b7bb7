"""Decoding with a router of its own: exactly what one pass over the whole text gives."""

from __future__ import annotations

import pytest
import torch

from moba_megatron.ops import moba_attention
from moba_megatron.ops.decode import block_means, continue_text, decode_tokens
from moba_megatron.ops.router import Router
from moba_megatron.ops.selection import Selection

TOKENS, HEADS, KV_HEADS, BLOCK, TOP_K, SIZE = 90, 4, 2, 8, 3, 6
SHAPES = [(2, 1), (2, 2), (4, 1), (4, 2)]
SELECTIONS = [{}, {"selector": "threshold", "threshold": 0.6}, {"budgets": (3, 2)}]


def inputs(router_heads, router_key_heads, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    shapes = [(HEADS, 8), (KV_HEADS, 8), (KV_HEADS, 8), (router_heads, SIZE), (router_key_heads, SIZE)]
    return [torch.randn(TOKENS, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def whole(q, k, v, router_q, router_k, selection):
    return moba_attention(
        q, k, v, block_size=BLOCK, top_k=selection.blocks(TOP_K), backend="reference", **selection.settings,
        router=Router(router_q, router_k),
    )  # fmt: skip


@pytest.mark.parametrize("heads", SHAPES)
@pytest.mark.parametrize("how", SELECTIONS)
def test_decoding_equals_one_pass(heads, how):
    tensors, selection = inputs(*heads), Selection(**how)
    q, k, v, router_q, router_k = tensors
    expected = whole(*tensors, selection)
    assert not torch.allclose(expected, moba_attention(q, k, v, block_size=BLOCK, top_k=TOP_K, backend="gathered"))
    settings = {"block_size": BLOCK, "top_k": TOP_K, "selection": selection}
    for end, new in ((TOKENS, 1), (TOKENS - 2, 5), (TOKENS, 40), (BLOCK, 2), (16, 16)):
        part = slice(end - new, end)
        made = continue_text(
            q[part], k[:end], v[:end], router_q_tHC=router_q[part], router_k_SJC=router_k[:end], **settings
        )
        kept = continue_text(
            q[part], k[:end], v[:end], block_means(router_k[:end], BLOCK), router_q_tHC=router_q[part], **settings
        )
        for out in (made, kept):
            torch.testing.assert_close(out, expected[part], rtol=0, atol=1e-12)


@pytest.mark.parametrize("heads", SHAPES)
def test_texts_side_by_side(heads):
    q, k, v, router_q, router_k = (torch.stack([x, x.flip(0)]) for x in inputs(*heads))
    out = decode_tokens(
        q[:, -1], k, v, block_size=BLOCK, top_k=TOP_K, router_q_bHC=router_q[:, -1], router_k_bSJC=router_k
    )
    for row in range(2):
        expected = whole(q[row], k[row], v[row], router_q[row], router_k[row], Selection())
        torch.testing.assert_close(out[row], expected[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"router_k_SJC": None}, "a router's queries without its keys or their summaries"),
        ({"router_q_tHC": None}, "a router's keys without its queries"),
        ({"router_q_tHC": torch.zeros(1, 3, SIZE, dtype=torch.float64)}, "router.q has 3 heads"),
        ({"router_k_SJC": torch.zeros(5, 1, SIZE, dtype=torch.float64)}, "keys of 5 tokens for a text of 90"),
        ({"router_k_SJC": torch.zeros(90, 1, 4, dtype=torch.float64)}, "must have one head size"),
        ({"selection": Selection("recent")}, "looks at no scores"),
    ],
)
def test_refusals(change, message):
    q, k, v, router_q, router_k = inputs(2, 1)
    given = {"router_q_tHC": router_q[-1:], "router_k_SJC": router_k, "block_size": BLOCK, "top_k": TOP_K, **change}
    with pytest.raises(ValueError, match=message):
        continue_text(q[-1:], k, v, **given)
