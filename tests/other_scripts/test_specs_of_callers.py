"""`moba_megatron.megatron` as Megatron-LM and Megatron-Bridge call it: the same model as ours, or a clear refusal."""

import ast
import dataclasses
import os
import subprocess
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from callers import (
    LENGTH,
    VOCABULARY,
    GPTModelConfig,
    Provider,
    builder_of_016,
    megatron_lm_flags,
    model_settings,
    replace_core_attention,
    transformer_config,
)
from distributed import run_ranks
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from model_examples import tiny, tokens

from moba_megatron.config import AttentionConfig, ConfigError
from moba_megatron.megatron import MoBATransformerLayer, hybrid_stack_spec, layer_spec, spec
from moba_megatron.megatron.settings import attention_plan
from moba_megatron.model import specs
from moba_megatron.model.norm import RMSNorm
from moba_megatron.platform.libraries import optional_libraries

ATTENTION = {"block_size": 8, "top_k": 2, "last_n_full": 1}


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """The file that MOBA_CONFIG names."""
    file = tmp_path / "moba.yaml"
    file.write_text("attention: {block_size: 8, top_k: 2, last_n_full: 1}\n")
    monkeypatch.setenv("MOBA_CONFIG", str(file))
    return file


def loss_and_layers(build):
    """(loss, gradients' norm, how each layer attends, class of its first layer) of a model on one rank."""
    from moba_megatron import platform
    from moba_megatron.config import ParallelConfig

    platform.start_model_parallel(ParallelConfig())
    platform.seed_all(5)
    model = build()
    ids, positions, labels = tokens(2, LENGTH)
    loss = model(ids, positions, None, labels=labels).mean()
    loss.backward()
    norm = sum(parameter.grad.square().sum() for parameter in model.parameters()).sqrt()
    layers = model.decoder.layers
    attends = [str(layer.self_attention.core_attention.attention) for layer in layers]
    return loss.item(), norm.item(), attends, type(layers[0])


def ours():
    from callers import gpt_model

    from moba_megatron.model.schedule import AttentionSchedule
    from moba_megatron.model.specs import block_spec

    config = transformer_config()
    return gpt_model(config, block_spec(config, AttentionSchedule.from_config(AttentionConfig(**ATTENTION), 2)))


CALLERS = {
    "GPTModelConfig": lambda: GPTModelConfig(transformer_config(), layer_spec).build(),
    "TransformerConfig": lambda: GPTModelConfig(transformer_config(), lambda c: layer_spec(c.transformer)).build(),
    "Bridge": lambda: Provider(**model_settings(), transformer_layer_spec=layer_spec).provide(),
    "keyword": lambda: Provider(
        **model_settings(), transformer_layer_spec=partial(layer_spec, attention=ATTENTION)
    ).provide(),
    "up to 0.18": lambda: builder_of_016(transformer_config()),
}


@pytest.mark.parametrize("caller", CALLERS)
def test_every_caller_gets_the_model_of_the_schedule(settings, monkeypatch, caller):
    expected = run_ranks(1, loss_and_layers, ours)[0]
    if caller == "keyword":
        monkeypatch.delenv("MOBA_CONFIG")
    loss, norm, attends, layer = run_ranks(1, loss_and_layers, CALLERS[caller])[0]
    assert (loss, norm) == expected[:2]
    assert attends == ["moba B=8 K=2", "full"] == expected[2]
    assert layer is (MoBATransformerLayer if caller == "up to 0.18" else TransformerLayer)


def test_one_spec_serves_all_layers_and_norms_are_as_configured():
    config = transformer_config(qk_layernorm=True)
    found = layer_spec(config, attention=ATTENTION)
    assert isinstance(found, ModuleSpec)
    attention = found.submodules.self_attention.submodules
    assert attention.q_layernorm is attention.k_layernorm is found.submodules.input_layernorm is RMSNorm


def test_layers_that_differ_come_as_those_of_this_pipeline_stage(monkeypatch):
    monkeypatch.setattr("megatron.core.parallel_state.get_pipeline_model_parallel_rank", lambda: 0)
    config = transformer_config(num_moe_experts=2, moe_layer_freq=[0, 1])
    found = layer_spec(config, attention=ATTENTION)
    assert isinstance(found, TransformerBlockSubmodules) and len(found.layer_specs) == 2
    assert found.layer_specs[0] is not found.layer_specs[1]


def test_sequence_parallelism_of_local_layers_gets_our_final_norm(monkeypatch, settings):
    monkeypatch.setattr("megatron.core.parallel_state.get_pipeline_model_parallel_rank", lambda: 0)
    config = transformer_config(tensor_model_parallel_size=2, sequence_parallel=True)
    found = layer_spec(config)
    assert isinstance(found, TransformerBlockSubmodules) and found.layer_norm is RMSNorm
    with pytest.raises(ConfigError, match="sequence_parallel = True with local layers"):
        spec.module(config, spec.submodules)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"mtp_num_layers": 1}, "multi-token prediction are not supported; leave --mtp-num-layers out"),
        ({"attention_backend": "local"}, "attention_backend = local puts megatron-core's own attention in place"),
        ({"transformer_impl": "inference_optimized"}, "transformer_impl = 'inference_optimized'"),
        ({"flash_decode": True}, "flash_decode = True attends fully, past MoBA"),
        ({"hybrid_context_parallel": True}, "context-parallel groups that differ from sample to sample"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(given, says):
    from megatron.core.transformer.enums import AttnBackend

    config = transformer_config()
    for name, value in given.items():
        setattr(config, name, AttnBackend.local if value == "local" else value)
    for asked in (config, GPTModelConfig(config)):
        with pytest.raises(ValueError, match=says):
            layer_spec(asked, attention=ATTENTION)


def test_modelopt_and_full_transformer_engine_layers_are_refused():
    with pytest.raises(ConfigError, match="restore_modelopt_state"):
        layer_spec(GPTModelConfig(transformer_config(), restore_modelopt_state=True), attention=ATTENTION)
    provider = Provider(**model_settings(), use_transformer_engine_full_layer_spec=True)
    with pytest.raises(ConfigError, match="has no core attention to replace"):
        layer_spec(provider, attention=ATTENTION)
    with pytest.raises(ConfigError, match="SimpleNamespace has no TransformerConfig"):
        layer_spec(megatron_lm_flags().get_args(), attention=ATTENTION)


def layers_of_its_own(config):
    """As Megatron-Bridge's providers of models that are more than megatron-core's layers."""


def default_layer_spec(config):
    """As that of all others."""


@pytest.mark.parametrize(("brings", "refused"), [(layers_of_its_own, True), (default_layer_spec, False)])
def test_models_with_layers_of_their_own_are_refused(brings, refused):
    @dataclass
    class OneModelProvider(Provider):
        transformer_layer_spec: Any = field(default_factory=lambda: partial(brings))

    provider = OneModelProvider(**model_settings())
    provider.transformer_layer_spec = layer_spec
    if not refused:
        assert isinstance(layer_spec(provider, attention=ATTENTION), ModuleSpec)
        return
    with pytest.raises(ConfigError, match=r"OneModelProvider has layers of its own \(layers_of_its_own\)"):
        layer_spec(provider, attention=ATTENTION)


def test_what_transformer_engine_computes_takes_no_settings_of_ours(monkeypatch, capfd):
    library = dataclasses.replace(optional_libraries()["transformer_engine"], available=True)
    monkeypatch.setattr(specs, "optional_libraries", lambda: {"transformer_engine": library})
    local = specs.gpt_layer_specs.get_gpt_layer_local_spec
    monkeypatch.setattr(specs.gpt_layer_specs, "get_gpt_layer_with_transformer_engine_spec", local)
    config = transformer_config(transformer_impl="transformer_engine", cp_comm_type="a2a")
    for given, says in (
        ({"attention": ATTENTION, "exchange": {"full": "p2p"}}, "exchange.full = p2p has no effect .* --cp-comm-type"),
        ({**ATTENTION, "full_backend": "torch"}, "attention.full_backend = torch has no effect"),
    ):
        with pytest.raises(ConfigError, match=says):
            layer_spec(config, attention=given)
    layer_spec(config, attention={"attention": ATTENTION, "exchange": {"moba": "dispatch"}})
    assert "always-full layers: Transformer Engine, cp_comm_type a2a" in capfd.readouterr().out
    layer_spec(config, attention={"attention": {"block_size": 8}, "exchange": "dispatch"})


def test_inference_that_goes_past_the_core_attention_raises(settings):
    def started():
        from moba_megatron import platform
        from moba_megatron.config import ParallelConfig

        platform.start_model_parallel(ParallelConfig())
        platform.seed_all(5)
        attention = CALLERS["Bridge"]().decoder.layers[0].self_attention
        for call in (attention.flash_decode, attention.flash_decode_and_prefill):
            with pytest.raises(ValueError, match="inference engine bypasses MoBA and attends fully"):
                call()

    run_ranks(1, started)


@pytest.mark.parametrize("name", ["qk_clip", "log_max_attention_logit"])
def test_the_largest_score_is_not_to_be_had(settings, name):
    def build():
        return Provider(**model_settings(**{name: True}), transformer_layer_spec=layer_spec).provide()

    with pytest.raises(AssertionError, match="qk_clip and log_max_attention_logit need the largest score"):
        run_ranks(1, loss_and_layers, build)


def test_norms_that_count_from_one_are_refused(settings):
    def build():
        config = model_settings(layernorm_zero_centered_gamma=True)
        return Provider(**config, transformer_layer_spec=layer_spec).provide()

    with pytest.raises(AssertionError, match="layernorm_zero_centered_gamma = True"):
        run_ranks(1, loss_and_layers, build)


MASKING = {"dataloader_inter_document_masking": True}


@pytest.mark.parametrize(
    ("flags", "ranks", "says"),
    [
        ({"create_attention_mask_in_dataloader": True}, 1, "add --no-create-attention-mask-in-dataloader"),
        (MASKING, 2, "--dataloader-inter-document-masking with --context-parallel-size 2 cuts whole samples"),
        ({"reset_attention_mask": True}, 1, "--reset-attention-mask acts through a mask"),
        ({"seq_length": 4}, 1, "attention.block_size = 8 is over seq_length = 4"),
        (MASKING, 1, None),
        ({"create_attention_mask_in_dataloader": False}, 2, None),
    ],
)
def test_flags_of_megatron_lm_that_do_not_fit_are_refused(monkeypatch, flags, ranks, says):
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", megatron_lm_flags(**flags))
    config = transformer_config(context_parallel_size=ranks)
    if says is None:
        layer_spec(config, attention=ATTENTION)
        return
    with pytest.raises(ConfigError, match=says):
        layer_spec(config, attention=ATTENTION)


def test_the_flag_of_the_length_goes_before_that_of_the_positions(monkeypatch):
    """Megatron-LM fills `GPTModelConfig.seq_length` with --max-position-embeddings."""
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", megatron_lm_flags(seq_length=4))
    with pytest.raises(ConfigError, match="attention.block_size = 8 is over seq_length = 4"):
        layer_spec(GPTModelConfig(transformer_config(), seq_length=4096), attention=ATTENTION)
    with pytest.raises(ConfigError, match="attention.block_size = 8 is over seq_length = 4"):
        hybrid_stack_spec("*-", attention={"block_size": 8}, stack_spec=ModuleSpec(module=object))


def test_faults_of_megatron_lm_itself_are_told(monkeypatch, capfd):
    flags = {"dist_ckpt_optim_fully_reshardable": True, "overlap_grad_reduce": True}
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", megatron_lm_flags(**flags))
    layer_spec(transformer_config(), attention=ATTENTION)
    assert "saves optimizer state under the wrong parameters" in capfd.readouterr().out


def test_flags_that_are_not_parsed_yet_are_not_asked(monkeypatch):
    def not_yet():
        raise AssertionError("args is not initialized.")

    module = megatron_lm_flags()
    module.get_args = not_yet
    monkeypatch.setitem(sys.modules, "megatron.training.global_vars", module)
    assert isinstance(layer_spec(transformer_config(), attention=ATTENTION), ModuleSpec)


def test_another_core_attention_put_into_the_spec_is_refused(settings):
    """As `--attention-backend local` does between import and building."""

    def build():
        replace_core_attention(spec)
        return loss_and_layers(CALLERS["up to 0.18"])

    with pytest.raises(AssertionError, match="the script put DotProductAttention in place of MoBA's core attention"):
        run_ranks(1, build)


def test_layers_of_multi_token_prediction_are_refused(settings):
    with pytest.raises(ConfigError, match="multi-token prediction are not supported"):
        spec.module(transformer_config(), spec.submodules, is_mtp_layer=True)


def test_dropout_in_attention_is_refused_when_the_model_is_built(settings):
    def build():
        return Provider(**model_settings(attention_dropout=0.1), transformer_layer_spec=layer_spec).provide()

    with pytest.raises(AssertionError, match=r"attention_dropout = 0.1 is not MoBA: set it to 0.0"):
        run_ranks(1, loss_and_layers, build)


STAGES = {**ATTENTION, "stages": [{"until": 0.9}, {"until": 1.0, "kind": "full"}]}


def test_a_stage_is_named_or_asked_for(monkeypatch):
    monkeypatch.delenv("MOBA_STAGE", raising=False)
    with pytest.raises(
        ConfigError, match="the schedule has 2 stages, .* set MOBA_STAGE to the one that is meant, 1 to 2"
    ):
        layer_spec(transformer_config(), attention=STAGES)
    monkeypatch.setenv("MOBA_STAGE", "2")
    assert attention_plan(STAGES, 2, None).stage == 1
    for wrong in ("0", "3", "full", "-1"):
        monkeypatch.setenv("MOBA_STAGE", wrong)
        with pytest.raises(ConfigError, match=f"MOBA_STAGE = '{wrong}': give a stage of the schedule, 1 to 2"):
            layer_spec(transformer_config(), attention=STAGES)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("attention: {blocksize: 8}", "attention.blocksize: unknown key; did you mean attention.block_size"),
        ("{blocksize: 8, top_k: 2}", "attention.blocksize: unknown key"),
        ("attention: {block_size: 0}", "attention.block_size = 0"),
        ("attention: {block_size: 8, last_n_full: 3}", "attention.last_n_full = 3 is over num_layers = 2"),
        ("attention: {block_size: 8, full_layers: [7]}", "names layer 7: layers are counted from 1 to 2"),
        ("attention: {block_size: 8}\nmodel: {num_layers: 2}", "model: unknown key"),
        ("attention: {block_size: 8}\nexchange: carrier_pigeon", "exchange.moba = 'carrier_pigeon'"),
        ("{block_size: 8, router_dim: 8}", "attention.router_dim = 8 has no effect with attention.router = own"),
        (
            "{block_size: 8, summary: min_max, layers: {1: {summary: mean}, 2: {summary: mean}}}",
            "no MoBA layer uses it",
        ),
        ("", "must hold a mapping|no attention setting"),
        ("attention: {block_size: 8", "is not valid YAML"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, content, says):
    settings.write_text(content)
    with pytest.raises(ConfigError, match=says):
        layer_spec(transformer_config())


def test_one_word_of_an_exchange_in_a_base_is_one_for_each_kind(settings):
    (settings.parent / "base.yaml").write_text("attention: {block_size: 8}\nexchange: a2a\n")
    settings.write_text("base: base.yaml\nexchange: {moba: dispatch}\n")
    assert attention_plan(settings, 2, None).settings["exchange"] == {"moba": "dispatch", "full": "a2a"}


def test_ranks_with_other_settings_are_refused(settings):
    def build():
        if torch.distributed.get_rank() == 1:
            settings.with_name("other.yaml").write_text("{block_size: 16}")
            os.environ["MOBA_CONFIG"] = str(settings.with_name("other.yaml"))
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            layer_spec(transformer_config())
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 1:
            layer_spec(transformer_config())

    with pytest.raises(AssertionError, match="rank 1 and another rank have different attention settings"):
        run_ranks(2, build)


def test_settings_that_are_missing_are_an_error(monkeypatch):
    monkeypatch.delenv("MOBA_CONFIG", raising=False)
    with pytest.raises(ConfigError, match="no attention settings: set MOBA_CONFIG to a YAML file"):
        layer_spec(transformer_config())
    monkeypatch.setenv("MOBA_CONFIG", "/nowhere/moba.yaml")
    with pytest.raises(ConfigError, match="no such configuration file: /nowhere/moba.yaml"):
        layer_spec(transformer_config())


def test_settings_are_printed_once(settings, capfd):
    settings.write_text("{block_size: 16, top_k: 2, backend: gathered}")
    for _ in range(3):
        layer_spec(transformer_config())
    out = capfd.readouterr().out
    assert out.count("moba B=16 K=2") == 1 and str(settings) in out and "backend gathered" in out


def test_file_dictionary_and_section_say_the_same(settings):
    plans = [attention_plan(given, 2, None) for given in (settings, ATTENTION, AttentionConfig(**ATTENTION), None)]
    assert len({plan.schedule for plan in plans}) == 1
    both = attention_plan({"attention": ATTENTION, "exchange": "dispatch"}, 2, None)
    assert both.settings["exchange"] == {"moba": "dispatch", "full": "dispatch"}


def test_an_example_configuration_is_the_one_that_train_py_reads():
    section = tiny().attention
    assert attention_plan(section, 2, None).file.attention is section


def test_megatron_lm_builds_the_same_model_itself(settings):
    """The builder that pretrain_gpt.py calls, where the installed package carries it (from 0.19 on)."""
    pytest.importorskip("megatron.training.models.gpt", reason="this megatron-core comes without megatron.training")

    def theirs():
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.training.models.gpt import GPTModelBuilder
        from megatron.training.models.gpt import GPTModelConfig as Theirs

        config = Theirs(
            transformer=transformer_config(),
            transformer_layer_spec=layer_spec,
            vocab_size=VOCABULARY,
            seq_length=LENGTH,
            position_embedding_type="rope",
        )
        return GPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())

    assert run_ranks(1, loss_and_layers, theirs) == run_ranks(1, loss_and_layers, ours)


def test_the_specs_need_no_more_than_their_extra():
    """What is imported beyond megatron-core is in the extra `megatron`, or comes with it."""
    code = (
        "import sys, megatron.core.models.gpt; before = set(sys.modules)\n"
        "import moba_megatron.megatron\n"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    extra = {"omegaconf", "antlr4", "pydantic", "pydantic_core", "annotated_types", "typing_inspection", "yaml"}
    others = set(ast.literal_eval(done.stdout)) - extra - {"moba_megatron", "torch", "triton", "megatron", "attr"}
    assert {name for name in others if name not in sys.stdlib_module_names} == set()
