"""From a family's folder into a MoBA training at another layout, and out again as that family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from huggingface_models import IDS, MODELS, SIZES, YARN, save_model
from safetensors.torch import load_file
from small_run import TOKENS, small_config, train_here
from transformers import AutoConfig, MistralConfig, Phi3Config

from moba_megatron.config import ConfigError, ModelConfig, config_from_dict
from moba_megatron.config.huggingface import model_section, read_huggingface_config
from moba_megatron.convert.export_hf import export_huggingface
from moba_megatron.convert.exported import open_exported
from moba_megatron.convert.families import huggingface_config
from moba_megatron.convert.verify import verify

LONG = {"vocab_size": 128, "max_position_embeddings": 256}


def started(folder: Path, source: Path, **changes: Any) -> Any:
    """A short MoBA training from a Hugging Face folder."""
    values = small_config(folder, training__steps=3).model_dump(mode="json")
    values["model"] = {"init_from": str(source)}
    for name, value in changes.items():
        section, key = name.split("__")
        values[section][key] = value
    return config_from_dict(values)


@pytest.mark.parametrize("name", ["phi3", "phi3-partial-longrope", "smollm3-yarn", "qwen3-yarn"])
def test_a_family_trains_at_any_layout_and_comes_out_as_itself(tmp_path, name):
    kind, changes = MODELS[name]
    source = tmp_path / "source"
    save_model(source, kind(**{**SIZES, **LONG, **changes}))
    shutil.copytree(TOKENS / "tokenizer", source, dirs_exist_ok=True)
    config = started(tmp_path, source, parallel__tensor=2, parallel__pipeline=2)
    run_ranks(4, train_here, config, 4)
    exported = open_exported(config.run.dir)
    export_huggingface(exported, tmp_path / "out", decode="moba")
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "out"))
    assert before["model_type"] == after["model_type"] and before["architectures"] == after["architectures"]
    tensors = [
        {key: tensor.shape for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
        for folder in (source, tmp_path / "out")
    ]
    assert tensors[0] == tensors[1]
    (found,) = run_ranks(1, verify, exported, tmp_path / "out")
    assert found[-1].name == "under MoBA (median token)"
    assert all(text.relative < 1e-5 for text in found), found


PUBLISHED = {
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        "AutoTokenizer": "Xenova/gpt-4o",
    },
    "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 99, "max_position_embeddings": 128, "sliding_window": 256,
    "original_max_position_embeddings": 32, "partial_rotary_factor": 0.75, "rope_theta": 10000.0,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}, "lm_head_bias": False,
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
"""As Phi-4-mini says it, smaller."""


def written(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def section(folder: Path, values: dict[str, Any]) -> ModelConfig:
    return ModelConfig.model_validate(model_section(read_huggingface_config(written(folder, values))))


def test_phi_is_said_as_published_where_the_lengths_give_the_attention_factor(tmp_path):
    model = section(tmp_path, PUBLISHED)
    assert (model.rotary_percent, model.rotary_channels, model.rotary_original_length) == (0.75, 12, 32)
    common: dict[str, Any] = {"dtype": torch.float32, "moba": None, "special_ids": {}}
    same = huggingface_config(model, length=128, **common)
    assert same["rope_scaling"] == PUBLISHED["rope_scaling"] and same["partial_rotary_factor"] == 0.75
    assert section(tmp_path / "same", same) == model
    longer = huggingface_config(model, length=64, **common)
    assert longer["rope_scaling"]["attention_factor"] == model.attention_factor == pytest.approx((1.4) ** 0.5)
    assert section(tmp_path / "longer", longer).attention_factor == model.attention_factor
    for values in (same, longer):
        rope = AutoConfig.from_pretrained(written(tmp_path / "read", values)).rope_parameters
        assert rope["partial_rotary_factor"] == 0.75 and rope["rope_type"] == "longrope"
        assert rope["original_max_position_embeddings"] == 32


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sliding_window": 64}, "sliding_window = 64: attention within a window is not supported; set sliding_window"),
        ({"lm_head_bias": True}, "lm_head_bias = true"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_mine.Phi3ForCausalLM"}}, "take auto_map out"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear': Phi3ForCausalLM"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6}}, "'longrope' without long_factor"),
    ],
)
def test_what_phi_cannot_mean_is_refused(tmp_path, changes, expected):
    with pytest.raises(ConfigError) as error:
        section(tmp_path, {**PUBLISHED, **changes})
    assert expected in str(error.value)


def test_other_scalings_of_phi_are_written_as_longrope(tmp_path):
    """It knows no yarn: what transformers reads there under this name is longrope."""
    kind, changes = Phi3Config, {**IDS, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}}
    source = tmp_path / "source"
    save_model(source, kind(**{**SIZES, **LONG, **changes}))
    shutil.copytree(TOKENS / "tokenizer", source, dirs_exist_ok=True)
    extended = {f"rotary_{key}": YARN[key] for key in ("beta_fast", "beta_slow")}
    extended |= {"rotary_scaling": "yarn", "rotary_scaling_factor": 4.0, "rotary_original_length": 32}
    config = started(tmp_path, source, model__init_from=str(source), **{f"model__{k}": v for k, v in extended.items()})
    run_ranks(1, train_here, config)
    exported = open_exported(config.run.dir)
    export_huggingface(exported, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["rope_scaling"]["rope_type"] == "longrope"
    (found,) = run_ranks(1, verify, exported, tmp_path / "out")
    assert all(text.relative < 1e-5 for text in found), found


def test_layers_without_rotary_embedding_are_said_by_list_or_by_interval(tmp_path):
    smollm = {**SIZES, "model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"]}
    assert section(tmp_path, smollm).no_rope_freq == [0, 0, 0, 1]
    assert section(tmp_path, smollm).rotary_base == 2e6
    assert section(tmp_path, smollm).share_embeddings_and_output_weights
    assert section(tmp_path, {**smollm, "no_rope_layer_interval": 2}).no_rope_freq == [0, 1, 0, 1]
    assert section(tmp_path, {**smollm, "no_rope_layers": [0, 1, 1, 0, 1]}).no_rope_freq == [1, 0, 0, 1]
    assert section(tmp_path, {**smollm, "no_rope_layers": [1, 1, 1, 1]}).no_rope_freq is None
    with pytest.raises(ConfigError, match="no_rope_layers has 2 entries for 4 layers"):
        section(tmp_path, {**smollm, "no_rope_layers": [1, 1]})
    with pytest.raises(ConfigError, match="no_rope_layer_interval = 0 must be"):
        section(tmp_path, {**smollm, "no_rope_layer_interval": 0})
    windows = {"use_sliding_window": True, "sliding_window": 8}
    with pytest.raises(ConfigError, match="sliding_window = 8"):
        section(tmp_path, {**smollm, **windows})
    section(tmp_path, {**smollm, **windows, "use_sliding_window": False})


def test_an_export_is_what_the_model_came_from_or_what_is_asked_for(tmp_path):
    mistral = section(tmp_path, MistralConfig(**SIZES, sliding_window=None, architectures=None).to_dict())
    common: dict[str, Any] = {"length": 128, "dtype": torch.float32, "moba": None, "special_ids": {}}

    def kind(**changes: Any) -> str:
        return huggingface_config(mistral.model_copy(update=changes), **common)["model_type"]

    assert kind() == "mistral" and kind(export_as=None) == "llama"
    assert kind(export_as="phi3") == "phi3" and kind(export_as="smollm3") == "smollm3"
    with pytest.raises(ConfigError, match="Qwen2ForCausalLM does not compute model.add_qkv_bias = False: use llama"):
        kind(export_as="qwen2")
    assert kind(export_as=None, rotary_percent=0.5) == "phi3"
    with pytest.raises(ConfigError, match="no plain model of transformers has model.rotary_percent = 0.5 and model.no"):
        kind(rotary_percent=0.5, no_rope_freq=[0, 0, 0, 1])
