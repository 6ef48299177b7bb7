"""The feed-forward in chunks of tokens against the feed-forward of all tokens at once."""

from __future__ import annotations

import pytest
import torch
from distributed import run_ranks
from model_examples import VOCABULARY, tiny

from moba_megatron import platform
from moba_megatron.model.builder import build_model
from moba_megatron.model.feed_forward import _in_chunks
from moba_megatron.model.schedule import AttentionSchedule

LENGTH, BATCH = 50, 2


def results(precision: str, tokens: int | None) -> dict[str, torch.Tensor]:
    """Output of a layer's feed-forward, and the gradients of its input and weights; None: all tokens at once."""
    config = tiny(training={"precision": precision})
    torch.manual_seed(0)
    (model,) = build_model(config, VOCABULARY, AttentionSchedule.from_config(config.attention, 2))
    mlp = model.decoder.layers[0].mlp
    generator = torch.Generator().manual_seed(1)
    shape, dtype = (LENGTH, BATCH, config.model.hidden_size), next(mlp.parameters()).dtype
    hidden, upstream = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    hidden.requires_grad_()
    out, bias = (mlp.forward if tokens is None else _in_chunks(mlp, tokens))(hidden)
    assert bias is None and out.dtype == dtype
    named = dict(mlp.named_parameters())
    found = torch.autograd.grad(out, [hidden, *named.values()], upstream)
    return {"out": out.detach(), **dict(zip(["hidden", *named], found, strict=True))}


def compared(tokens: int) -> tuple[dict[str, torch.Tensor], ...]:
    platform.start_model_parallel(tiny().parallel)
    return results("fp32", None), results("fp32", tokens), results("bf16", None), results("bf16", tokens)


@pytest.mark.parametrize("tokens", [1, 24, 1000])
def test_chunks_give_the_output_and_gradients_of_the_whole(tokens):
    """A row at a time, a last chunk that is shorter, and one chunk."""
    whole, chunked, whole_bf16, chunked_bf16 = run_ranks(1, compared, tokens)[0]
    assert len(whole) == 4 and whole.keys() == chunked.keys() == chunked_bf16.keys()
    for name, expected in whole.items():
        scale = expected.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(
            chunked[name], expected, rtol=0, atol=1e-6 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
        # Gradients of the weights are summed in fp32: no less exact than the whole in bf16, up to a last rounding.
        allowed = (whole_bf16[name].float() - expected).abs().max() + 2**-8 * scale
        assert (chunked_bf16[name].float() - expected).abs().max() <= allowed, name
