"""The seam: our core attention by itself against a dense definition, and inside real GPT models."""

import pytest
import torch
from distributed import run_ranks
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from model_examples import VOCABULARY, gradients, pack, tiny, tokens

from moba_megatron import platform
from moba_megatron.model.core_attention import MoBACoreAttention, pack_boundaries, set_attention_stage
from moba_megatron.model.schedule import FULL, AttentionSchedule, LayerAttention

MOBA = LayerAttention("moba", 4, 2)


def core_attention(attention=MOBA, mask=AttnMaskType.causal, kind="self", layer=1, **settings):
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        attention_dropout=0.0,
        transformer_impl="local",
    )
    for name, value in settings.items():
        setattr(config, name, value)
    return MoBACoreAttention(config, layer, mask, kind, attention=attention)


def qkv(length: int, batch: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(length, batch, heads, 8) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


def dense_moba(q, k, v, block_size: int, top_k: int) -> torch.Tensor:
    """MoBA of one sequence by its definition: q [t, n, d], k and v [t, g, d] -> [t, n * d]."""
    length, heads, size = q.shape
    output = torch.zeros_like(q)
    for head in range(heads):
        keys, values = (tensor[:, head * k.shape[1] // heads] for tensor in (k, v))
        for t in range(length):
            own = t // block_size
            means = [keys[i * block_size : (i + 1) * block_size].mean(0) for i in range(own)]
            scores = torch.stack([mean @ q[t, head] for mean in means]) if means else torch.zeros(0)
            chosen = {own, *scores.topk(min(top_k - 1, own)).indices.tolist()}
            seen = [u for u in range(t + 1) if u // block_size in chosen]
            weights = (keys[seen] @ q[t, head] / size**0.5).softmax(0)
            output[t, head] = weights @ values[seen]
    return output.flatten(1)


@pytest.mark.parametrize("batch", [1, 3])
def test_batches_equal_the_definition(batch):
    q, k, v = qkv(length=14, batch=batch)
    output = core_attention()(q, k, v, None)
    assert output.shape == (14, batch, 32) and output.is_contiguous()
    expected = torch.stack([dense_moba(q[:, i], k[:, i], v[:, i], 4, 2) for i in range(batch)], dim=1)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    for ours, theirs in zip(
        torch.autograd.grad(output, (q, k, v), upstream),
        torch.autograd.grad(expected, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_full_layers_attend_to_everything():
    q, k, v = qkv(length=14, batch=2)
    full = core_attention(FULL)(q, k, v, None)
    torch.testing.assert_close(
        full, core_attention(LayerAttention("moba", 4, 4))(q, k, v, None), rtol=1e-10, atol=1e-10
    )
    sparse = core_attention()(q, k, v, None)
    torch.testing.assert_close(full[:8], sparse[:8], rtol=1e-10, atol=1e-10)  # two blocks: everything is selected
    assert ((full[8:] - sparse[8:]).abs().amax(-1) > 1e-3).all()


def test_the_full_backend_is_asked_for_and_refused_under_context_parallelism():
    q, k, v = qkv(length=14, batch=1)
    config = core_attention().config
    common = (config, 1, AttnMaskType.causal, "self")
    named = MoBACoreAttention(*common, attention=FULL, full_backend="torch")
    assert torch.equal(named(q, k, v, None), core_attention(FULL)(q, k, v, None))
    elsewhere = MoBACoreAttention(*common, attention=FULL, full_backend="cudnn")
    with pytest.raises(ValueError, match="full-attention backend 'cudnn' is not available"):
        elsewhere(q, k, v, None)
    config.context_parallel_size = 2
    with pytest.raises(ValueError, match="full_backend = 'torch' with context_parallel_size = 2: .* use auto"):
        MoBACoreAttention(*common, attention=FULL, full_backend="torch")


@pytest.mark.parametrize("batch", [1, 2])
def test_the_workspace_reaches_the_operator(batch):
    q, k, v = qkv(length=14, batch=batch)
    common = (core_attention().config, 1, AttnMaskType.causal, "self")
    small = MoBACoreAttention(*common, attention=MOBA, workspace_bytes=1)
    torch.testing.assert_close(small(q, k, v, None), core_attention()(q, k, v, None), rtol=1e-10, atol=1e-10)
    refused = MoBACoreAttention(*common, attention=MOBA, backend="reference", workspace_bytes=4096)
    with pytest.raises(ValueError, match="workspace_bytes = 4096: backend 'reference'"):
        refused(q, k, v, None)


def test_packs_equal_their_documents():
    q, k, v = (tensor[:, 0] for tensor in qkv(length=23, batch=1))
    boundaries = [0, 9, 10, 10, 23]  # one of a single token, one empty
    output = core_attention()(q, k, v, None, packed_seq_params=pack(boundaries, 13))
    expected = [dense_moba(q[a:b], k[a:b], v[a:b], 4, 2) for a, b in zip(boundaries, boundaries[1:], strict=False)]
    assert output.shape == (23, 32)
    torch.testing.assert_close(output, torch.cat(expected), rtol=1e-10, atol=1e-10)


def test_padded_boundaries_win_and_padding_is_never_attended_to():
    q, k, v = (tensor[:, 0].detach() for tensor in qkv(length=20, batch=1))
    packed = pack([0, 6, 13], 12, padded=[0, 8, 20])  # 6 tokens and 2 of padding, 7 tokens and 5 of padding
    output = core_attention()(q, k, v, None, packed_seq_params=packed)
    for first, last in ((0, 6), (8, 15)):
        document = slice(first, last)
        torch.testing.assert_close(output[document], dense_moba(q[document], k[document], v[document], 4, 2))


def test_the_longest_document_of_a_padded_pack_is_not_known():
    """megatron-core's max_seqlen_q is then the longest without padding, which does not bound the padded documents."""
    assert pack_boundaries(pack([0, 6, 13], 7))[1] == 7
    boundaries, longest = pack_boundaries(pack([0, 6, 13], 7, padded=[0, 8, 20]))
    assert boundaries.tolist() == [0, 8, 20] and longest is None


def test_scale_is_passed_on():
    q, k, v = qkv(length=6, batch=1)
    config = core_attention().config
    scaled = MoBACoreAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=0.5, attention=FULL)
    torch.testing.assert_close(scaled(q, k, v, None), core_attention(FULL)(q * 0.5 * 8**0.5, k, v, None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1 is not MoBA: set it to 0.0"),
        ({"mask": AttnMaskType.no_mask}, "no_mask is not causal"),
        ({"mask": AttnMaskType.padding}, "padding is not causal"),
        ({"mask": AttnMaskType.arbitrary}, "arbitrary is not causal"),
        ({"kind": "cross"}, "attention_type = 'cross': MoBA is self-attention"),
        ({"window_size": (128, 0)}, r"window_size = \(128, 0\) is not MoBA"),
        ({"softmax_type": "learnable"}, "softmax_type = 'learnable'"),
        ({"softmax_type": "off-by-one"}, "softmax_type = 'off-by-one'"),
        ({"multi_latent_attention": True}, "multi_latent_attention"),
        ({"fp8_dot_product_attention": True}, "fp8 attention"),
        ({"fp8_multi_head_attention": True}, "fp8 attention"),
    ],
)
def test_settings_that_are_not_moba_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        core_attention(**settings)
    with pytest.raises(ValueError, match="layer 1 cannot use MoBA: "):
        core_attention(FULL, **settings)


def test_calls_that_are_not_moba_are_refused():
    q, k, v = qkv(length=6, batch=1)
    layer = core_attention()
    with pytest.raises(ValueError, match="attention_bias is not MoBA"):
        layer(q, k, v, None, attention_bias=torch.zeros(1))
    with pytest.raises(ValueError, match=r"attention_mask of shape \(1, 1, 6, 6\)"):
        layer(q, k, v, torch.ones(1, 1, 6, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="no_mask is not causal"):
        layer(q, k, v, None, attn_mask_type=AttnMaskType.no_mask)
    with pytest.raises(ValueError, match="1 queries and 6 keys"):
        layer(q[-1:], k, v, None)
    with pytest.raises(ValueError, match="qkv_format = 'bshd'"):
        layer(q[:, 0], k[:, 0], v[:, 0], None, packed_seq_params=PackedSeqParams(qkv_format="bshd"))
    with pytest.raises(ValueError, match="without cu_seqlens_q"):
        layer(q[:, 0], k[:, 0], v[:, 0], None, packed_seq_params=PackedSeqParams(qkv_format="thd"))
    with pytest.raises(ValueError, match="cu_seqlens_q and cu_seqlens_kv differ"):
        packed = pack([0, 2, 6], 4)
        packed.cu_seqlens_kv = torch.tensor([0, 3, 6], dtype=torch.int32)
        layer(q[:, 0], k[:, 0], v[:, 0], None, packed_seq_params=packed)


def test_the_stage_switch_reaches_every_layer():
    schedule = AttentionSchedule(((LayerAttention("moba", 4, 2), FULL), (FULL, FULL)), (0.9, 1.0))
    layers = torch.nn.ModuleList(core_attention(layer=number) for number in (1, 2))
    assert set_attention_stage([layers], schedule, 0) == 1  # layer 2 was MoBA and is full now
    assert [layer.attention for layer in layers] == list(schedule.stages[0])
    assert set_attention_stage(list(layers), schedule, 1) == 1
    assert [layer.attention for layer in layers] == [FULL, FULL]
    with pytest.raises(ValueError, match="stage 2 is not one of 0 to 1"):
        set_attention_stage([layers], schedule, 2)
    with pytest.raises(ValueError, match="layer 3, but the schedule has 2 layers"):
        set_attention_stage([core_attention(layer=3)], schedule, 0)


def built(config):
    from moba_megatron.model.builder import build_model

    (model,) = build_model(config, VOCABULARY, AttentionSchedule.from_config(config.attention, config.model.num_layers))
    return model


def loss_and_gradients(model, ids, positions, labels, packed=None):
    model.zero_grad()
    loss = model(ids, positions, None, labels=labels, packed_seq_params=packed)
    loss.sum().backward()
    return loss.detach(), gradients(model)


def test_a_model_packs_documents_as_if_they_were_separate():
    """Attention, blocks and rotary positions restart. The last case names the pack's length as the longest document."""

    def cases():
        platform.start_model_parallel(tiny().parallel)
        model = built(tiny())
        ids, positions, labels = tokens(1, 64)
        for boundaries, max_seqlen in (([0, 21, 23, 64], 41), ([0, 64], 64), ([0, 30, 64], 64)):
            packed_loss, packed_grads = loss_and_gradients(model, ids, positions, labels, pack(boundaries, max_seqlen))
            model.zero_grad()
            losses = []
            for a, b in zip(boundaries, boundaries[1:], strict=False):
                losses.append(model(ids[:, a:b], positions[:, a:b], None, labels=labels[:, a:b]))
                losses[-1].sum().backward()
            torch.testing.assert_close(packed_loss, torch.cat(losses, 1), rtol=0, atol=1e-5)
            for name, gradient in gradients(model).items():
                torch.testing.assert_close(
                    packed_grads[name], gradient, rtol=0, atol=1e-4 * gradient.abs().max().item()
                )
        whole = model(ids, positions, None, labels=labels)
        assert (whole - packed_loss)[:, :30].abs().max() < 1e-5 and (whole - packed_loss)[:, 31:].abs().max() > 0.05

    run_ranks(1, cases)


def test_rotary_positions_start_anew_at_every_document():
    """Seen in the first layer's queries, since attention itself depends on distances only."""

    def cases():
        platform.start_model_parallel(tiny().parallel)
        model = built(tiny())
        seen = []
        model.decoder.layers[0].self_attention.core_attention.register_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[0].detach().flatten(0, -3))
        )
        ids, positions, _ = tokens(1, 64)
        with torch.no_grad():
            for max_seqlen in (34, 64):
                model(ids, positions, None, packed_seq_params=pack([0, 30, 64], max_seqlen))
            model(ids, positions, None)
            for document in (slice(0, 30), slice(30, 64)):
                model(ids[:, document], positions[:, document], None)
        *packed, whole, first, second = seen
        for query in packed:
            torch.testing.assert_close(query, torch.cat([first, second]), rtol=0, atol=1e-5)
        assert (whole[31:] - packed[0][31:]).abs().amax() > 0.1

    run_ranks(1, cases)


def test_recomputation_gives_the_same_bits():
    def cases():
        platform.start_model_parallel(tiny().parallel)
        for packed in (None, pack([0, 21, 64], 43)):
            found = []
            for recompute in ("none", "selective", "full"):
                model = built(tiny(training={"recompute": recompute}))
                found.append(loss_and_gradients(model, *tokens(1, 64), packed))
            for loss, grads in found[1:]:
                assert torch.equal(loss, found[0][0])
                assert all(torch.equal(grads[name], found[0][1][name]) for name in grads)

    run_ranks(1, cases)


def test_small_k_differs_from_dense_and_the_stage_switch_makes_them_equal():
    def cases():
        config = tiny(attention={"stages": [{"until": 0.5}, {"until": 1.0, "kind": "full"}]})
        platform.start_model_parallel(config.parallel)
        schedule = AttentionSchedule.from_config(config.attention, 2)
        sparse, dense = built(config), built(tiny(attention={"kind": "full"}))
        ids, positions, _ = tokens(1, 64)
        with torch.no_grad():
            before = sparse(ids, positions, None) - dense(ids, positions, None)
            set_attention_stage([sparse], schedule, 1)
            after = sparse(ids, positions, None) - dense(ids, positions, None)
        assert before[:, :16].abs().max() < 1e-4  # two blocks of 8: all is selected
        assert before[:, 16:].abs().amax() > 0.05
        assert torch.count_nonzero(after) == 0
        # A layer that was built with another core attention cannot become MoBA, and nothing changes then.
        sparse.decoder.layers[1].self_attention.core_attention = torch.nn.Identity()
        with pytest.raises(ValueError, match="layer 2 is MoBA in stage 0, but was built with Identity"):
            set_attention_stage([sparse], schedule, 0)
        assert sparse.decoder.layers[0].self_attention.core_attention.attention == FULL
        assert set_attention_stage([sparse], schedule, 1) == 0

    run_ranks(1, cases)


def test_the_future_changes_nothing():
    def cases():
        platform.start_model_parallel(tiny().parallel)
        model = built(tiny())
        ids, positions, _ = tokens(1, 64)
        changed = ids.clone()
        changed[:, 40:] = (changed[:, 40:] + 1) % VOCABULARY
        with torch.no_grad():
            difference = model(ids, positions, None) - model(changed, positions, None)
        assert torch.count_nonzero(difference[:, :40]) == 0
        assert difference[:, 40:].abs().amax(-1).min() > 0

    run_ranks(1, cases)
