"""Models from configurations: sizes of the report's Table 1, numbers against a plain Llama, settings, seeds."""

from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from model_examples import VOCABULARY, plain_llama_logits, tiny, tokens

from moba_megatron import platform
from moba_megatron.config import load_config
from moba_megatron.model.schedule import AttentionSchedule

PAPER = Path(__file__).parents[2] / "configs" / "paper"


@pytest.mark.parametrize(
    ("name", "millions", "billions_of_tokens"),
    [("545m", 546, 10.8), ("822m", 822, 15.3), ("1.1b", 1147, 20.6), ("1.5b", 1586, 27.4), ("2.1b", 2125, 36.9)],
)
def test_the_models_of_table_1(name, millions, billions_of_tokens):
    from moba_megatron.model.builder import count_parameters

    config = load_config(PAPER / f"scaling_8k.yaml:{name}_moba")
    count = count_parameters(config)
    assert round(count.layers / 1e6) == millions
    assert count.embedding == count.output == config.model.hidden_size * config.model.vocab_size
    assert config.tokens_per_step * config.training.steps == pytest.approx(billions_of_tokens * 1e9, rel=1e-3)
    assert (config.attention.block_size, config.attention.top_k, config.data.sequence_length) == (512, 3, 8192)
    assert config.model.num_attention_heads == config.model.num_layers and config.model.head_size == 128


def test_count_equals_a_real_model_tied_or_not():
    def parameters(config):
        return sum(parameter.numel() for parameter in build(config).parameters())

    from moba_megatron.model.builder import count_parameters

    for shared in (False, True):
        config = tiny(model={"share_embeddings_and_output_weights": shared, "add_qkv_bias": True, "qk_layernorm": True})
        count = count_parameters(config)
        assert run_ranks(1, parameters, config) == [count.total]
        assert (count.output == 0) == shared


@pytest.mark.parametrize(
    "rotary",
    [
        {"rotary_scaling": "yarn", "rotary_scaling_factor": 4.0},
        {"rotary_percent": 0.5, "no_rope_freq": [0, 1], "rotary_scaling": "yarn", "rotary_scaling_factor": 4.0},
        {"rotary_scaling": "longrope", "rotary_short_factors": [1.0] * 4, "rotary_long_factors": [2.0] * 4},
    ],
)
def test_a_rotary_embedding_of_any_kind_counts_no_parameters(rotary):
    """On the meta device, where frequencies are numbers all the same."""
    from moba_megatron.model.builder import count_parameters

    assert count_parameters(tiny(model=rotary)) == count_parameters(tiny())


def test_count_needs_a_vocabulary():
    from moba_megatron.model.builder import count_parameters

    with pytest.raises(ValueError, match="no vocabulary size"):
        count_parameters(tiny(model={"vocab_size": None}))


def build(config, stage: int = 0):
    """The single model chunk of a one-rank run."""
    from moba_megatron.model.builder import build_model

    platform.start_model_parallel(config.parallel)
    schedule = AttentionSchedule.from_config(config.attention, config.model.num_layers)
    (model,) = build_model(config, VOCABULARY, schedule, stage=stage)
    return model


def test_logits_equal_a_plain_llama():
    """K >= M makes MoBA dense: then every weight, norm and rotation must be where a Llama has it."""
    variants = [
        tiny(attention={"top_k": 8}),
        tiny(attention={"kind": "full"}, model={"rotary_base": 5000.0}),
        tiny(attention={"kind": "full"}, model={"rotary_scaling": "linear", "rotary_scaling_factor": 4.0}),
    ]

    def both(config):
        model = build(config)
        ids, positions, _ = tokens(2, 64)
        return model(ids, positions, None).detach(), plain_llama_logits(model, config, ids).detach()

    for config in variants:
        ours, plain = run_ranks(1, both, config)[0]
        assert ours.shape == (2, 64, VOCABULARY)
        assert ours.std() > 0.5
        torch.testing.assert_close(
            ours, plain, rtol=0, atol=64 * torch.finfo(torch.float32).eps * plain.abs().max().item()
        )


def test_rotary_scaling_of_llama_3():
    """Wavelengths below 8192 / 4 stay, those over 8192 are divided by the factor, those between lie between."""

    def frequencies(scaling):
        config = tiny(model={"kv_channels": 64, "rotary_base": 5e5, **scaling})
        return build(config).rotary_pos_emb.inv_freq

    (plain,) = run_ranks(1, frequencies, {})
    (scaled,) = run_ranks(1, frequencies, {"rotary_scaling": "llama3", "rotary_scaling_factor": 8.0})
    wavelength = 2 * torch.pi / plain
    short, long = wavelength < 2048, wavelength > 8192
    between = ~short & ~long
    assert short.any() and long.any() and between.any()
    assert torch.equal(scaled[short], plain[short])
    torch.testing.assert_close(scaled[long], plain[long] / 8)
    assert ((scaled[between] < plain[between]) & (scaled[between] > plain[between] / 8)).all()


def test_same_seed_same_weights():
    def weights(seed):
        return {name: p.detach() for name, p in build(tiny(run={"dir": "unused", "seed": seed})).named_parameters()}

    first, second, other = (run_ranks(1, weights, seed)[0] for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["output_layer.weight"], other["output_layer.weight"])
    assert first["decoder.layers.0.mlp.linear_fc1.weight"].std().item() == pytest.approx(0.2, rel=0.1)


def test_bf16_models_are_bf16_throughout():
    def look():
        model = build(tiny(training={"precision": "bf16"}))
        ids, positions, labels = tokens(1, 64)
        loss = model(ids, positions, None, labels=labels)
        loss.mean().backward()
        return {p.dtype for p in model.parameters()}, {p.grad.dtype for p in model.parameters()}, loss.dtype

    assert run_ranks(1, look) == [({torch.bfloat16}, {torch.bfloat16}, torch.float32)]


def test_settings_that_megatron_core_gets_wrong_by_default():
    from moba_megatron.model.builder import transformer_config

    plain = transformer_config(tiny(), device_type="cpu")
    assert plain.transformer_impl == "local" and plain.calculate_per_token_loss
    assert plain.cp_comm_type == "p2p"
    assert plain.attention_dropout == plain.hidden_dropout == 0.0
    assert (plain.overlap_p2p_comm, plain.batch_p2p_comm, plain.batch_p2p_sync) == (False, True, False)
    assert not plain.rotary_interleaved and not plain.add_bias_linear
    assert not (plain.masked_softmax_fusion or plain.bias_activation_fusion or plain.gradient_accumulation_fusion)
    assert not (plain.apply_rope_fusion or plain.cross_entropy_loss_fusion)
    interleaved = transformer_config(
        tiny(model={"num_layers": 4}, parallel={"pipeline": 2, "virtual_pipeline": 2}), device_type="cpu"
    )
    assert (interleaved.overlap_p2p_comm, interleaved.batch_p2p_comm) == (True, False)
    assert not interleaved.deallocate_pipeline_outputs
    full = transformer_config(tiny(training={"recompute": "full"}), device_type="cpu")
    assert (full.recompute_granularity, full.recompute_method, full.recompute_num_layers) == ("full", "uniform", 1)


def test_a_schedule_of_another_length_is_refused():
    def wrong():
        from moba_megatron.model.builder import build_model

        config = tiny()
        platform.start_model_parallel(config.parallel)
        with pytest.raises(ValueError, match="the schedule has 3 layers, the model num_layers = 2"):
            build_model(config, VOCABULARY, AttentionSchedule.from_config(config.attention, 3))

    run_ranks(1, wrong)


def test_only_the_output_layer_does_without_fused_weight_gradients():
    """With Transformer Engine they are on. megatron-core's own linear layer wants apex's kernel for them, also where it
    is the output layer, of which the chunked loss takes the weight alone."""

    def action():
        from megatron.core import tensor_parallel

        from moba_megatron.model import builder, gpt

        library = platform.Library("transformer_engine", True, "2.20.2", "", "", "")
        builder.optional_libraries = lambda: {
            "transformer_engine": library,
            "apex": platform.optional_libraries()["apex"],
        }
        builder.choose_implementation = lambda device_type: "transformer_engine"
        with_te = builder._machine_settings("cuda")
        builder.choose_implementation = lambda device_type: "local"
        fusion = {
            "with TE": with_te,
            "without": builder._machine_settings("cuda"),
            "CPU": builder._machine_settings("cpu"),
        }
        config = build(tiny()).config
        config.gradient_accumulation_fusion = True
        settings = {"config": config, "init_method": config.init_method, "bias": False}
        with pytest.raises(RuntimeError, match="gradient_accumulation_fusion"):
            tensor_parallel.ColumnParallelLinear(8, 16, **settings)
        with gpt._output_layer_without_fusion():
            layer = tensor_parallel.ColumnParallelLinear(8, 16, **settings)
        stock = tensor_parallel.ColumnParallelLinear is not gpt._OutputLayer
        found = {name: made["gradient_accumulation_fusion"] for name, made in fusion.items()}
        return found, layer.gradient_accumulation_fusion, config.gradient_accumulation_fusion, stock

    expected = {"with TE": True, "without": False, "CPU": False}
    assert run_ranks(1, action) == [(expected, False, True, True)]
