"""Mixtures of experts between Hugging Face folders and runs: what configurations mean, what ranks read, what comes out
after training."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from huggingface_models import EXPERTS, MIXTURES, SIZES, VOCABULARY, save_model
from small_run import TOKENS, train_here
from test_families import LONG, section, started
from test_logits import configuration
from test_round_trip import assert_same_tensors, tensors
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

from moba_megatron.config import Config, ConfigError, ModelConfig
from moba_megatron.config.huggingface import model_section, read_huggingface_config
from moba_megatron.config.pretrained import with_pretrained_model
from moba_megatron.convert.export_hf import export_huggingface
from moba_megatron.convert.exported import open_exported
from moba_megatron.convert.families import family_of, huggingface_config
from moba_megatron.convert.mapping import parameter_counts
from moba_megatron.convert.verify import verify
from moba_megatron.generation.engine import continue_prompt
from moba_megatron.generation.loading import load_generator

QWEN3 = Qwen3MoeConfig(**{**SIZES, **EXPERTS}, architectures=None).to_dict()
QWEN2 = Qwen2MoeConfig(**{**SIZES, **EXPERTS}, shared_expert_intermediate_size=80, architectures=None).to_dict()
MIXTRAL = MixtralConfig(**SIZES, num_local_experts=4, architectures=None).to_dict()


def test_what_a_configuration_means(tmp_path):
    three = section(tmp_path, {**QWEN3, "norm_topk_prob": True, "decoder_sparse_step": 2})
    assert (three.num_moe_experts, three.moe_router_topk, three.moe_router_pre_softmax) == (4, 2, False)
    assert (three.ffn_size, three.expert_ffn_size, three.expert_layers) == (96, 48, [False, True, False, True])
    assert three.moe_aux_loss_coeff == 0.001 and three.qk_layernorm and not three.add_qkv_bias
    assert section(tmp_path, {**QWEN3, "mlp_only_layers": [0, 9]}).moe_layer_freq == [0, 1, 1, 1]
    assert section(tmp_path, QWEN3).moe_layer_freq == 1 and section(tmp_path, QWEN3).moe_router_pre_softmax
    two = section(tmp_path, QWEN2)
    assert (two.moe_shared_expert_intermediate_size, two.moe_shared_expert_gate, two.add_qkv_bias) == (80, True, True)
    assert not section(tmp_path, {**QWEN2, "qkv_bias": False}).add_qkv_bias
    mixtral = section(tmp_path, MIXTRAL)
    assert (mixtral.expert_ffn_size, mixtral.moe_router_pre_softmax, mixtral.rotary_base) == (96, False, 1e6)


def test_experts_are_counted_by_either_name(tmp_path):
    """transformers 5 saves a Qwen 3 MoE by the name of Mixtral's key, transformers 4 by its own."""
    assert "num_experts" not in QWEN3
    plain = {key: value for key, value in QWEN3.items() if key != "num_local_experts"}
    assert section(tmp_path, QWEN3) == section(tmp_path, {**plain, "num_experts": 4})
    assert section(tmp_path, plain).num_moe_experts == 128
    with pytest.raises(ConfigError, match="num_experts = 8 and num_local_experts = 4: keep the one"):
        section(tmp_path, {**QWEN3, "num_experts": 8})


@pytest.mark.parametrize(
    ("values", "changes", "expected"),
    [
        (QWEN3, {"num_local_experts": 1}, "num_experts = 1: a mixture has at least 2"),
        (QWEN3, {"num_experts_per_tok": 5}, "num_experts_per_tok = 5 is over num_experts = 4"),
        (QWEN3, {"num_experts_per_tok": 1, "norm_topk_prob": True}, "num_experts_per_tok = 1, and norm_topk_prob = tr"),
        (QWEN3, {"mlp_only_layers": [0, 1, 2, 3]}, "leave no layer of 4 with experts"),
        (QWEN3, {"decoder_sparse_step": 5}, "decoder_sparse_step = 5 and mlp_only_layers = [] leave no layer"),
        (QWEN3, {"decoder_sparse_step": 0}, "decoder_sparse_step = 0 must be a whole number from 1"),
        (QWEN3, {"mlp_only_layers": [1.5]}, "mlp_only_layers = [1.5] must be a list of whole numbers"),
        (QWEN3, {"norm_topk_prob": "yes"}, "norm_topk_prob = 'yes' must be true or false"),
        (QWEN3, {"attention_bias": True}, "attention_bias = true"),
        (QWEN3, {"use_sliding_window": True, "sliding_window": 64}, "sliding_window = 64"),
        (MIXTRAL, {"num_experts_per_tok": 1}, "num_experts_per_tok = 1, and mixtral always"),
        (MIXTRAL, {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1: noise"),
        (MIXTRAL, {"sliding_window": 64}, "sliding_window = 64"),
        (QWEN2, {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "layer_types has sliding_attention"),
        (QWEN2, {"layer_types": None, "use_sliding_window": True, "sliding_window": 64}, "sliding_window = 64"),
    ],
)
def test_what_is_not_supported_is_refused_by_key_and_value(tmp_path, values, changes, expected):
    with pytest.raises(ConfigError) as error:
        section(tmp_path, {**values, **changes})
    assert expected in str(error.value)


def test_a_window_that_no_layer_has_is_none(tmp_path):
    assert QWEN2["sliding_window"] == 0
    window = {"use_sliding_window": True, "sliding_window": 64}
    assert section(tmp_path, {**QWEN2, **window}) == section(tmp_path, QWEN2)
    assert section(tmp_path, {**QWEN2, **window, "layer_types": None, "max_window_layers": 0}).num_layers == 4


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"moe_router_score_function": "sigmoid"}, "moe_router_score_function = sigmoid: no mixture"),
        ({"moe_router_enable_expert_bias": True}, "moe_router_enable_expert_bias = True"),
        ({"moe_router_topk_scaling_factor": 2.5}, "moe_router_topk_scaling_factor = 2.5: no mixture"),
        ({"moe_router_num_groups": 2}, "moe_router_num_groups = 2"),
        ({"moe_expert_capacity_factor": 1.5}, "go on without it (model.init_from = this run, model.moe_expert_cap"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "sinkhorn: no mixture"),
        ({"moe_shared_expert_intermediate_size": 8}, "moe_shared_expert_gate = False: in transformers a shared"),
        ({"add_qkv_bias": True}, "MixtralForCausalLM not model.add_qkv_bias = True, Qwen3MoeForCausalLM not"),
        ({"qk_layernorm": False, "moe_layer_freq": [0, 1, 1, 1]}, "MixtralForCausalLM not model.moe_layer_freq = [0"),
    ],
)
def test_what_no_mixture_of_transformers_has_is_refused_at_export(tmp_path, changes, expected):
    model = section(tmp_path, QWEN3).model_copy(update={"export_as": None, **changes})
    with pytest.raises(ConfigError) as error:
        family_of(model)
    assert expected in str(error.value) and "moba-megatron evaluate reads the checkpoint" in str(error.value)


def test_the_kind_of_an_export_follows_from_the_model(tmp_path):
    three, mixtral = section(tmp_path, QWEN3), section(tmp_path, MIXTRAL)
    anew: dict[str, Any] = {"export_as": None}
    assert family_of(three.model_copy(update=anew)) == "qwen3_moe"
    assert family_of(mixtral.model_copy(update=anew)) == "mixtral"
    assert family_of(section(tmp_path, QWEN2).model_copy(update=anew)) == "qwen2_moe"
    with pytest.raises(ConfigError, match="Qwen3ForCausalLM does not compute model.num_moe_experts = 4: use qwen3_moe"):
        family_of(three.model_copy(update={"export_as": "qwen3"}))
    common: dict[str, Any] = {"length": 128, "dtype": torch.float32, "moba": None, "special_ids": {}}
    for model in (three, mixtral, section(tmp_path, QWEN2)):
        values = huggingface_config(model, **common)
        assert section(tmp_path, values) == model
        assert AutoConfig.for_model(**values).num_experts == 4


@torch.no_grad()
def parameters_here(config: Config) -> dict[str, Any]:
    """What this rank holds after loading, by name, the bytes of it and of what it read from the files."""
    from moba_megatron import platform
    from moba_megatron.convert.initial import load_initial_weights
    from moba_megatron.convert.safetensors_folder import SafetensorsFolder
    from moba_megatron.convert.weights import canonical_parameters
    from moba_megatron.model.builder import build_model
    from moba_megatron.model.schedule import AttentionSchedule

    platform.start_model_parallel(config.parallel)
    schedule = AttentionSchedule.from_config(config.attention, config.model.num_layers)
    (model,) = build_model(config, VOCABULARY, schedule)
    read, plain = [], SafetensorsFolder.read

    def counted(self, name, where=()):
        tensor = plain(self, name, where)
        read.append(tensor.numel() * tensor.element_size())
        return tensor

    SafetensorsFolder.read = counted
    load_initial_weights(config, VOCABULARY, [model])
    held = dict(canonical_parameters(model))
    return {
        "held": {name: parameter.detach().clone() for name, parameter in held.items()},
        "bytes": sum(parameter.numel() * 4 for parameter in held.values()),
        "read": sum(read),
    }


@pytest.fixture(scope="module")
def stacked(models, tmp_path_factory):
    """The mixtures as transformers 5 saves them where it is told to, all experts of a layer in two tensors."""
    folder = tmp_path_factory.mktemp("stacked")
    for name in ("mixtral", "qwen2-moe"):
        model = AutoModelForCausalLM.from_pretrained(models[name].folder)
        model.save_pretrained(folder / name, save_original_format=False, max_shard_size="60KB")
        assert any(key.endswith("mlp.experts.gate_up_proj") for key in tensors(folder / name))
    return folder


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_each_rank_reads_its_own_experts_alone(models, stacked, name):
    one = run_ranks(1, parameters_here, configuration(models[name].folder, {}))[0]
    experts = {key for key in one["held"] if ".experts." in key}
    for folder in (models[name].folder, stacked / name):
        found = run_ranks(2, parameters_here, configuration(folder, {"expert": 2}))
        assert {key for rank in found for key in rank["held"]} == one["held"].keys()
        for rank in found:
            assert rank["read"] == rank["bytes"] < one["bytes"]
            assert len(experts & rank["held"].keys()) == len(experts) // 2
            assert all(torch.equal(tensor, one["held"][key]) for key, tensor in rank["held"].items())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """MoBA training on two ranks, experts apart, from a Qwen 3 MoE with a dense layer; in: (source, run)."""
    folder = tmp_path_factory.mktemp("trained")
    kind, changes = MIXTURES["qwen3-moe"]
    save_model(folder / "source", kind(**{**SIZES, **LONG, **changes}))
    shutil.copytree(TOKENS / "tokenizer", folder / "source", dirs_exist_ok=True)
    config = started(folder, folder / "source", parallel__expert=2, training__global_batch_size=4)
    assert config.model.moe_aux_loss_coeff == 0.001
    run_ranks(2, train_here, config, 2)
    return folder / "source", Path(config.run.dir)


def test_a_mixture_comes_out_of_training_as_what_it_was(trained, tmp_path):
    source, run = trained
    exported = open_exported(run)
    export_huggingface(exported, tmp_path / "out", decode="moba", shard_bytes=100_000)
    before, after = tensors(source), tensors(tmp_path / "out")
    assert {name: tensor.shape for name, tensor in before.items()} == {n: t.shape for n, t in after.items()}
    assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items() if ".experts.3." in name)
    (found,) = run_ranks(1, verify, exported, tmp_path / "out")
    assert found[-1].name == "under MoBA (median token)" and all(text.relative < 1e-5 for text in found), found
    total, active = parameter_counts(exported.model)
    assert total == sum(tensor.numel() for tensor in after.values())
    idle = sum(tensor.numel() for name, tensor in after.items() if ".experts." in name) // 2
    assert active == total - idle
    card = (tmp_path / "out/README.md").read_text()
    assert f"| parameters | {total:,}, {active:,} active for a token |" in card
    assert "| experts | 2 of 4 for each token, in 3 of 4 layers |" in card
    values = json.loads((tmp_path / "out/config.json").read_text())
    assert (values["mlp_only_layers"], values["norm_topk_prob"]) == ([1], False)


def test_a_checkpoint_of_experts_and_its_export_write_the_same_text(trained, tmp_path):
    _, run = trained
    export_huggingface(open_exported(run), tmp_path / "out", decode="moba")
    prompt = [3 + 7 * i * i % 29 for i in range(100)]
    settings = {"max_new_tokens": 12, "temperature": 0.0}
    both = [
        list(continue_prompt(load_generator(path, "moba").model, prompt, **settings))
        for path in (run, tmp_path / "out")
    ]
    assert both[0] == both[1] and len(both[0]) == 12


def test_a_run_of_experts_starts_another_at_another_layout(trained, tmp_path):
    """From a run folder, with a balancing of its own."""
    source, run = trained
    config = started(tmp_path, run, model__init_from=str(run), model__moe_aux_loss_coeff=0.1, training__steps=3)
    assert config.model.export_as == "qwen3_moe"
    run_ranks(1, train_here, config)
    export_huggingface(open_exported(config.run.dir), tmp_path / "out")
    assert tensors(tmp_path / "out").keys() == tensors(source).keys()


def test_a_folder_of_the_whole_and_of_its_parts_is_one_model(models, stacked, tmp_path):
    """What was read stacked is written apart."""
    from moba_megatron.convert.import_hf import import_huggingface

    run_ranks(1, import_huggingface, stacked / "mixtral", tmp_path / "run")
    export_huggingface(open_exported(tmp_path / "run"), tmp_path / "out")
    assert_same_tensors(models["mixtral"].folder, tmp_path / "out")


def test_a_configuration_of_before_experts_is_complete_without_them(tmp_path):
    plain = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1, init_from=str(tmp_path / "gone"))
    written = {key: value for key, value in plain.model_dump().items() if "moe_" not in key}
    assert with_pretrained_model({"model": written}) == {"model": written}


def test_counts_of_a_dense_model_are_those_of_its_tensors(models):
    model = ModelConfig.model_validate(model_section(read_huggingface_config(models["llama"].folder)))
    counted = sum(math.prod(tensor.shape) for tensor in tensors(models["llama"].folder).values())
    assert parameter_counts(model) == (counted, counted)
