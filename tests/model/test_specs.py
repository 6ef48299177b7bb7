"""Layer specs: only the core attention changes, by layer and pipeline stage, local or Transformer Engine."""

import dataclasses
import re

import pytest
from megatron.core.extensions import transformer_engine_spec_provider
from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_mlp_module_spec
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from model_examples import tiny

from moba_megatron.model import specs
from moba_megatron.model.builder import transformer_config
from moba_megatron.model.core_attention import MoBACoreAttention
from moba_megatron.model.norm import RMSNorm
from moba_megatron.model.schedule import FULL, AttentionSchedule, LayerAttention
from moba_megatron.platform.libraries import optional_libraries

MOBA = LayerAttention("moba", 8, 2)


def core(layer_spec):
    return layer_spec.submodules.self_attention.submodules.core_attention


def built(layer_spec, number, config, **others):
    """The core attention of a layer, made with the arguments that megatron-core's SelfAttention passes."""
    return core(layer_spec)(
        config=config, layer_number=number, attn_mask_type=AttnMaskType.causal, attention_type="self",
        cp_comm_type="p2p", softmax_scale=None, pg_collection=None, **others,
    )  # fmt: skip


def attentions(block, config, first=1):
    return [built(layer, number, config).attention for number, layer in enumerate(block.layer_specs, first)]


def test_only_the_core_attention_of_the_copy_changes():
    stock = get_gpt_layer_local_spec(normalization="RMSNorm")
    ours = specs.moba_layer_spec(stock, block_size=8, top_k=2, backend="reference")
    assert core(stock) is DotProductAttention
    assert core(ours).func is MoBACoreAttention
    backends = {"backend": "reference", "full_backend": "auto", "workspace_bytes": None}
    assert core(ours).keywords == {"attention": MOBA, "exchange": "auto", **backends}
    assert ours.submodules.self_attention.module is stock.submodules.self_attention.module
    for field in dataclasses.fields(stock.submodules):
        if field.name != "self_attention":
            assert getattr(ours.submodules, field.name) is getattr(stock.submodules, field.name)
    theirs = stock.submodules.self_attention.submodules
    for field in dataclasses.fields(theirs):
        if field.name != "core_attention":
            assert getattr(ours.submodules.self_attention.submodules, field.name) is getattr(theirs, field.name)


def test_a_spec_without_attention_and_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="core_attention to replace"):
        specs.moba_layer_spec(get_mlp_module_spec(use_te=False), block_size=8, top_k=2)
    with pytest.raises(ValueError, match="block_size and top_k of at least 1, not 0 and 2"):
        specs.moba_layer_spec(get_gpt_layer_local_spec(), block_size=0, top_k=2)


def config_of(layers: int = 4, **sections):
    return transformer_config(
        tiny(model={"num_layers": layers, **sections.pop("model", {})}, **sections), device_type="cpu"
    )


def schedule_of_four() -> AttentionSchedule:
    other = LayerAttention("moba", 16, 3)
    return AttentionSchedule(((MOBA, other, FULL, FULL), (FULL, FULL, FULL, MOBA)), (0.9, 1.0))


def test_local_layers_have_their_own_attention_and_our_norm():
    config = config_of(model={"qk_layernorm": True})
    block = specs.block_spec(config, schedule_of_four(), backend="gathered", pp_rank=0)
    assert attentions(block, config) == list(schedule_of_four().stages[0])
    assert built(block.layer_specs[0], 1, config).backend == "gathered"
    # One spec serves them all.
    assert len(block.layer_specs) == 4 and len(set(map(id, block.layer_specs))) == 1
    assert block.layer_norm is RMSNorm
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention.submodules
        assert layer.submodules.input_layernorm is layer.submodules.pre_mlp_layernorm is RMSNorm
        assert attention.q_layernorm is attention.k_layernorm is RMSNorm
    later = specs.block_spec(config_of(), schedule_of_four(), stage=1, pp_rank=0)
    assert attentions(later, config_of()) == [FULL, FULL, FULL, MOBA]


@pytest.mark.parametrize("number", [0, 5])
def test_layers_that_the_schedule_does_not_have_are_refused(number):
    block = specs.block_spec(config_of(), schedule_of_four(), pp_rank=0)
    with pytest.raises(ValueError, match=f"layer {number}, but the attention schedule has 4 layers"):
        built(block.layer_specs[0], number, config_of())


def test_mixtures_of_experts_are_where_the_configuration_says():
    config = config_of()
    config.num_moe_experts, config.moe_layer_freq = 4, [0, 1, 1, 0]
    block = specs.block_spec(config, schedule_of_four(), pp_rank=0)
    dense, experts = (get_gpt_layer_local_spec(num_experts=count) for count in (None, 4))

    def mlp(layer):
        return str(layer.submodules.mlp)

    assert [mlp(layer) for layer in block.layer_specs] == [mlp(s) for s in (dense, experts, experts, dense)]
    assert mlp(dense) != mlp(experts)
    assert attentions(block, config) == list(schedule_of_four().stages[0])
    config.moe_layer_freq = 2
    alternate = specs.block_spec(config, schedule_of_four(), pp_rank=0)
    assert [mlp(layer) for layer in alternate.layer_specs] == [mlp(s) for s in (experts, dense, experts, dense)]
    config.moe_layer_freq = [1, 0]
    with pytest.raises(ValueError, match=r"moe_layer_freq = \[1, 0\]: .* for each of the 4 layers"):
        specs.block_spec(config, schedule_of_four(), pp_rank=0)
    for wrong in (0, "[1]*4"):
        config.moe_layer_freq = wrong
        with pytest.raises(ValueError, match=f"moe_layer_freq = {re.escape(repr(wrong))}"):
            specs.block_spec(config, schedule_of_four(), pp_rank=0)


def test_layer_norm_stays_where_the_configuration_says_so():
    config = config_of()
    config.normalization = "LayerNorm"
    block = specs.block_spec(config, schedule_of_four(), pp_rank=0)
    stock = get_gpt_layer_local_spec(normalization="LayerNorm")
    assert block.layer_specs[0].submodules.input_layernorm is stock.submodules.input_layernorm
    assert block.layer_norm is gpt_layer_specs.LNImpl


def test_each_pipeline_stage_gets_its_own_layers():
    config = config_of(parallel={"pipeline": 2})
    parts = [specs.block_spec(config, schedule_of_four(), pp_rank=rank) for rank in range(2)]
    assert [len(part.layer_specs) for part in parts] == [2, 2]
    config = config_of(parallel={"pipeline": 2, "virtual_pipeline": 2})
    parts = [
        specs.block_spec(config, schedule_of_four(), pp_rank=rank, vp_stage=chunk).layer_specs
        for chunk in range(2)
        for rank in range(2)
    ]
    assert [len(part) for part in parts] == [1, 1, 1, 1]


def test_a_schedule_of_another_length_is_refused():
    with pytest.raises(ValueError, match="the schedule has 4 layers, the model num_layers = 2"):
        specs.block_spec(config_of(2), schedule_of_four())


def transformer_engine_config():
    config = config_of(model={"qk_layernorm": True})
    config.transformer_impl = "transformer_engine"
    return config


@pytest.fixture
def stand_in(monkeypatch):
    """Transformer Engine as far as specs go: megatron-core's classes for it exist without it."""
    library = dataclasses.replace(optional_libraries()["transformer_engine"], available=True, reason="")
    monkeypatch.setattr(specs, "optional_libraries", lambda: {"transformer_engine": library})
    provider = transformer_engine_spec_provider.TESpecProvider
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", provider, raising=False)
    monkeypatch.setattr(gpt_layer_specs, "TENorm", TENorm, raising=False)
    monkeypatch.setattr(transformer_engine_spec_provider, "is_te_min_version", lambda *_, **__: True)


def test_transformer_engine_layers_keep_everything_but_our_core_attention(stand_in):
    schedule = schedule_of_four()
    config = transformer_engine_config()
    block = specs.block_spec(config, schedule, backend="triton", pp_rank=0)
    stock = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)
    assert core(stock) is TEDotProductAttention
    assert block.layer_norm is TENorm
    # Layer 3 is full in both stages and keeps the fused attention; layer 4 is full only at first and has ours.
    assert [schedule.always_full(number) for number in (1, 2, 3, 4)] == [False, False, True, False]
    layer = block.layer_specs[0]
    assert core(layer).keywords["full_core"] is TEDotProductAttention
    assert built(layer, 3, config, full_core=lambda **arguments: arguments)["layer_number"] == 3
    ours = [built(layer, number, config) for number in (1, 2, 4)]
    assert [module.attention for module in ours] == [schedule.stages[0][i] for i in (0, 1, 3)]
    assert {module.backend for module in ours} == {"triton"}
    ours, theirs = block.layer_specs[0].submodules, stock.submodules
    assert ours.self_attention.submodules.linear_qkv is theirs.self_attention.submodules.linear_qkv
    assert ours.self_attention.submodules.q_layernorm is theirs.self_attention.submodules.q_layernorm is TENorm
    assert ours.input_layernorm is theirs.input_layernorm
    # A spec, and from megatron-core 0.18 on a partial.
    mlps = [getattr(layer.mlp, "submodules", None) or layer.mlp.keywords["submodules"] for layer in (ours, theirs)]
    assert mlps[0] == mlps[1]


def test_transformer_engine_asked_for_and_missing_is_an_error():
    if optional_libraries()["transformer_engine"].available:
        pytest.skip("Transformer Engine is installed")
    with pytest.raises(ValueError, match="transformer_impl = 'transformer_engine', but module transformer_engine"):
        specs.block_spec(transformer_engine_config(), schedule_of_four())


def test_implementation_follows_device_and_library(stand_in):
    assert specs.choose_implementation("cuda") == "transformer_engine"
    assert specs.choose_implementation("cpu") == "local"


def test_implementation_without_the_library(monkeypatch):
    library = dataclasses.replace(optional_libraries()["transformer_engine"], available=False, reason="missing")
    monkeypatch.setattr(specs, "optional_libraries", lambda: {"transformer_engine": library})
    assert specs.choose_implementation("cuda") == "local"


def test_norm_marks_its_weight_for_sequence_parallelism():
    for sequence in (False, True):
        config = config_of(parallel={"tensor": 2, "sequence": sequence})
        config.use_cpu_initialization = True
        assert RMSNorm(config, 32).weight.sequence_parallel is sequence
