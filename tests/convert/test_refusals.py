"""What cannot be converted exactly is refused by name, before anything is written or started."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_models import MIXTURES, VOCABULARY
from safetensors.torch import load_file, save_file
from small_run import TOKENS
from test_logits import configuration

from moba_megatron.config import Config, ConfigError, ModelConfig
from moba_megatron.config.huggingface import family_of_folder, model_section, read_huggingface_config
from moba_megatron.convert.families import family_of
from moba_megatron.convert.initial import check_initial_weights
from moba_megatron.convert.mapping import huggingface_shapes, parameter_shapes, pieces
from moba_megatron.convert.piece import Arrangement
from moba_megatron.convert.weights import open_weights


@pytest.fixture
def folder(models, tmp_path) -> Path:
    """A copy of a model that a test may damage."""
    return Path(shutil.copytree(models["llama"].folder, tmp_path / "model"))


def change_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    values = {key: value for key, value in {**values, **changes}.items() if value != "gone"}
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2' is not one of llama, mistral, qwen2, qwen3, phi3, smollm3"),
        ({"model_type": "deepseek_v3"}, "model_type = 'deepseek_v3'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is not LlamaForCausalLM"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "code of its own, which is never run"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized weights"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_bias": True}, "attention_bias"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "sliding_window = 4096"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, "rope_type = 'dynamic'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "'llama3' without low_freq_factor"),
        ({"rope_theta": 5e5}, "rope_theta = 10000.0 and = 500000.0: keep one"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"num_hidden_layers": "gone"}, "num_hidden_layers is missing"),
    ],
)
def test_a_model_that_is_not_supported_is_refused_by_name(folder, changes, expected):
    change_config(folder, **changes)
    with pytest.raises(ConfigError) as error:
        model_section(read_huggingface_config(folder))
    assert expected in str(error.value)


def test_a_window_that_is_not_used_is_no_window(models):
    values = read_huggingface_config(models["qwen2"].folder)
    assert "use_sliding_window" in values and not values["use_sliding_window"]
    model_section({**values, "sliding_window": 4096})


def model_of(folder: Path) -> ModelConfig:
    return ModelConfig.model_validate(model_section(read_huggingface_config(folder)))


def test_tensors_that_do_not_fit_are_listed(folder):
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    tensors = load_file(first)
    name, *_ = tensors
    save_file({"model.extra": torch.zeros(2), name: tensors[name][:-1]}, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ConfigError) as error:
        open_weights(folder, model_of(folder))
    lines = str(error.value)
    assert "model.extra is not part of this model" in lines and "model.norm.weight is missing" in lines
    assert f"{name} has shape [{tensors[name].shape[0] - 1}" in lines


def test_a_tensor_in_two_files_or_in_none_is_refused(folder):
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    tensors = load_file(first)
    name, *_ = tensors
    save_file({**load_file(second), name: tensors[name]}, second)
    with pytest.raises(ConfigError, match=f"{name} is in {first.name} and in {second.name}"):
        open_weights(folder, model_of(folder))
    second.unlink()
    with pytest.raises(ConfigError, match=f"{second.name} cannot be read"):
        open_weights(folder, model_of(folder))


def test_an_index_that_names_the_wrong_file_is_refused(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = next(f for f in files if f != index["weight_map"]["model.norm.weight"])
    path.write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="holds model.norm.weight, but it does not"):
        open_weights(folder, model_of(folder))


def test_pickle_files_are_never_opened(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not opened")
    with pytest.raises(ConfigError, match="can run code") as error:
        open_weights(folder, model_of(folder))
    assert "save_pretrained" in str(error.value)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (None, "fetch the weights: hf download NAME --local-dir"),
        ("adapter_config.json", "merge_and_unload"),
        ("model-Q4_K_M.gguf", "GGUF files of llama.cpp: fetch the model in the format of transformers"),
        ("consolidated.safetensors", "weights in the maker's own names"),
    ],
)
def test_a_folder_without_weights_says_where_to_get_them(folder, file, expected):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    if file:
        (folder / file).write_bytes(b"{}")
    with pytest.raises(ConfigError) as error:
        open_weights(folder, model_of(folder))
    assert expected in str(error.value)


WAYS = [
    ({"model_type": "gpt2"}, "moba_megatron.hf.configure gives MoBA to every model"),
    (
        {"quantization_config": {"quant_method": "awq"}},
        "(awq): quantized weights are not supported: take the bf16 model",
    ),
    ({"sliding_window": 4096}, "set sliding_window: null in config.json"),
    ({"layer_types": ["sliding_attention"]}, "set all of them to it"),
    ({"attention_bias": True}, "moba_megatron.hf.configure"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "model.rotary_scaling = yarn"),
    ({"hidden_size": "gone"}, "fetch the file again (hf download NAME --local-dir"),
]


@pytest.mark.parametrize(("changes", "expected"), WAYS)
def test_a_refusal_names_a_way_to_go_on(folder, changes, expected):
    change_config(folder, **changes)
    with pytest.raises(ConfigError) as error:
        model_section(read_huggingface_config(folder))
    assert expected in str(error.value)


def test_weights_of_another_kind_of_number_are_refused(folder):
    path = next(path for path in folder.glob("*.safetensors") if "model.norm.weight" in load_file(path))
    tensors = load_file(path)
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"].to(torch.float8_e4m3fn)}, path)
    with pytest.raises(ConfigError, match="model.norm.weight has dtype F8_E4M3.*take the bf16 model"):
        open_weights(folder, model_of(folder))


def test_a_tied_model_may_store_both_copies_while_they_are_equal(models, tmp_path):
    folder = Path(shutil.copytree(models["qwen3-tied"].folder, tmp_path / "tied"))
    tensors = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.clone()}, folder / "model.safetensors")
    open_weights(folder, model_of(folder))
    save_file({**tensors, "lm_head.weight": embedding + 1}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="tie_word_embeddings = true: one of them is wrong"):
        open_weights(folder, model_of(folder))


def with_model(folder: Path, tokenizer: Path, **model: Any) -> Config:
    config = configuration(folder, {})
    data = config.data.model_copy(update={"tokenizer": str(tokenizer)})
    return config.model_copy(update={"model": config.model.model_copy(update=model), "data": data})


def test_a_run_that_starts_from_weights_has_their_sizes_and_their_tokenizer(folder):
    problems = with_model(folder, TOKENS / "tokenizer", layernorm_epsilon=1e-5, num_layers=3)
    with pytest.raises(ConfigError) as error:
        check_initial_weights(problems, VOCABULARY)
    assert "model.num_layers = 3, but" in str(error.value) and "model.layernorm_epsilon = 1e-05" in str(error.value)
    extended = with_model(folder, TOKENS / "tokenizer", rotary_scaling="linear", rotary_scaling_factor=4.0)
    lines = check_initial_weights(extended, VOCABULARY)
    assert any("rotary_scaling_factor = 4.0: the weights come from a model with 1.0" in line for line in lines)
    shutil.copytree(TOKENS / "tokenizer", folder, dirs_exist_ok=True)
    check_initial_weights(extended, VOCABULARY)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"w5"', '"other"'))
    with pytest.raises(ConfigError, match="is not the tokenizer of model.init_from"):
        check_initial_weights(extended, VOCABULARY)
    path.write_text(path.read_text().replace("<|endoftext|>", "<|end|>"))
    with pytest.raises(ConfigError, match="is not the tokenizer of model.init_from"):
        check_initial_weights(extended, VOCABULARY)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a Hugging Face folder"):
        configuration(tmp_path, {})


def test_what_no_plain_model_computes_is_not_exported(models):
    both = model_of(models["llama"].folder).model_copy(update={"add_qkv_bias": True, "qk_layernorm": True})
    with pytest.raises(ConfigError, match="no plain model"):
        family_of(both)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_number_of_every_tensor_has_exactly_one_place(models, ranks):
    """The table alone, without tensors of any size: over all ranks the pieces tile both sides."""
    whole = {"norm", "layer_norm", "layernorm", "router", "gate_weight"}
    for name, saved in models.items():
        model, files = model_of(saved.folder), Arrangement.of(family_of_folder(saved.folder))
        for arrangement in (files, files.stacked) if name in MIXTURES else (files,):
            shapes = huggingface_shapes(model, arrangement)
            places = {source: torch.zeros(shape, dtype=torch.int) for source, shape in shapes.items()}
            for parameter in parameter_shapes(model):
                for rank in range(ranks):
                    for piece in pieces(parameter, model, rank, ranks, arrangement=arrangement):
                        if rank == 0 or not any(word in parameter for word in whole):
                            places[piece.source][piece.there] += 1
            assert all((count == 1).all() for count in places.values())
