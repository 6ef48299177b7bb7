"""Rotary embeddings as both transformers and other engines write them, without a warning of transformers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_models import SIZES, YARN
from transformers import AutoConfig, LlamaConfig, Qwen2Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moba_megatron.config import ConfigError, ModelConfig, config_from_dict
from moba_megatron.config.huggingface import model_section, read_huggingface_config
from moba_megatron.config.pretrained import YOUNGER, with_pretrained_model
from moba_megatron.convert.families import huggingface_config
from moba_megatron.model.rotary import rotary_frequencies

SHAPE = {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "vocab_size": 99}
LENGTH = 128
LONGROPE = {"rotary_short_factors": [1.0] * 4, "rotary_long_factors": [1.0, 2.0, 3.0, 4.0]}
SCALINGS: dict[str, dict[str, Any]] = {
    "longrope": {"rotary_scaling": "longrope", **LONGROPE, "rotary_attention_factor": 1.19},
    "llama3-interpolated": {"rotary_scaling": "llama3", "rotary_scaling_factor": 8.0, "rotary_interpolation": 2.0},
    "yarn": {"rotary_scaling": "yarn", "rotary_scaling_factor": 4.0},
    "yarn-interpolated": {"rotary_scaling": "yarn", "rotary_scaling_factor": 4.0, "rotary_interpolation": 2.0},
    "yarn-stronger": {"rotary_scaling": "yarn", "rotary_scaling_factor": 4.0, "rotary_attention_factor": 1.5},
    "yarn-mscale": {
        "rotary_scaling": "yarn",
        "rotary_scaling_factor": 4.0,
        "rotary_mscale": 1.0,
        "rotary_mscale_all_dim": 0.7,
    },
}


def written(model: ModelConfig, folder: Path, length: int = LENGTH) -> dict[str, Any]:
    values = huggingface_config(model, length=length, dtype=torch.float32, moba=None, special_ids={})
    (folder / "config.json").write_text(json.dumps(values))
    return values


@pytest.mark.parametrize("scaling", SCALINGS)
def test_what_is_written_is_read_the_same_without_a_warning(tmp_path, monkeypatch, scaling):
    model = ModelConfig(**SHAPE, rotary_original_length=32, **SCALINGS[scaling])
    values = written(model, tmp_path)
    warned: list[str] = []
    monkeypatch.setattr(logging.getLogger("transformers"), "handle", lambda record: warned.append(record.getMessage()))
    config = AutoConfig.from_pretrained(tmp_path)
    assert warned == []
    rope = config.rope_parameters
    ours = rotary_frequencies(model)
    for length, expected in ((None, ours.short), (LENGTH, ours.long)):
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", seq_len=length)
        torch.testing.assert_close(frequencies, expected, rtol=2e-7, atol=0)
        assert factor == pytest.approx(model.attention_factor, rel=1e-12)
    back = ModelConfig.model_validate(model_section(read_huggingface_config(tmp_path)))
    assert back.attention_factor == pytest.approx(model.attention_factor, rel=1e-12)
    old = {key: value for key, value in values.items() if key != "rope_parameters"}
    assert model_section({**old}) == model_section(values)


def test_yarn_is_named_where_transformers_4_finds_its_factor(tmp_path):
    """That computes it as max_position_embeddings over the original length, whatever is said."""
    model = ModelConfig(**SHAPE, rotary_original_length=32, **SCALINGS["yarn"])
    for length, positions, kind in ((64, 128, "yarn"), (128, 128, "yarn"), (256, 256, "longrope")):
        values = written(model, tmp_path, length)
        assert (values["max_position_embeddings"], values["rope_scaling"]["rope_type"]) == (positions, kind)
        config = AutoConfig.from_pretrained(tmp_path)
        frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=length)
        torch.testing.assert_close(frequencies, rotary_frequencies(model).long, rtol=2e-7, atol=0)
        assert factor == pytest.approx(model.attention_factor, rel=1e-12)


@pytest.mark.parametrize("scaling", ["longrope", "llama3-interpolated", "yarn-interpolated"])
def test_engines_that_know_no_attention_factor_are_told_it(tmp_path, scaling):
    model = ModelConfig(**SHAPE, **SCALINGS[scaling])
    values = written(model, tmp_path)
    for rope in (values["rope_scaling"], values["rope_parameters"]):
        assert rope["short_mscale"] == rope["long_mscale"] == rope["attention_factor"] == model.attention_factor


def test_vllm_is_told_what_yarn_has_beyond_the_usual(tmp_path):
    beyond = {name: written(ModelConfig(**SHAPE, **SCALINGS[name]), tmp_path)["rope_scaling"] for name in SCALINGS}
    assert "attn_factor" not in beyond["yarn"]
    assert beyond["yarn-stronger"]["attn_factor"] == pytest.approx(1.5 / 1.1386294)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 1.1386294),
        ({"attention_factor": 1.3}, 1.3),
        ({"attention_factor": 1.0}, 1.0),
        ({"attention_factor": None, "mscale": 0.7, "mscale_all_dim": 0.7}, 1.0),
        ({"mscale": 0.7}, 1.1386294),
        ({"factor": None}, 1.1386294),
    ],
)
def test_yarn_is_read_in_both_dialects(changes, expected):
    rope = {**YARN, **changes}
    new = {**Qwen2Config(**SIZES).to_dict(), "rope_parameters": rope}
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    old |= {"rope_theta": rope["rope_theta"], "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"}}
    assert model_section(new) == model_section(old) == model_section({**new, **old})
    model = config_from_dict({
        "run": {"dir": "unused"},
        "model": model_section(new),
        "data": {"train": "unused", "tokenizer": "unused", "sequence_length": LENGTH},
        "training": {"steps": 10, "global_batch_size": 4},
        "optimizer": {"lr": 1e-3},
        "attention": {"kind": "full"},
    }).model  # fmt: skip
    assert model.attention_factor == pytest.approx(expected, abs=1e-7)
    assert (model.rotary_scaling_factor, model.rotary_original_length, model.max_position_embeddings) == (4.0, 32, 128)


def test_a_configuration_of_an_earlier_version_needs_its_source_no_more(tmp_path):
    values = model_section({**Qwen2Config(**SIZES).to_dict()})
    whole = ModelConfig.model_validate({**values, "init_from": str(tmp_path / "gone")}).model_dump()
    older = {key: value for key, value in whole.items() if key not in YOUNGER}
    assert with_pretrained_model({"model": older}) == {"model": older}
    ModelConfig.model_validate(older)
    with pytest.raises(ConfigError, match="is not a Hugging Face folder"):
        with_pretrained_model({"model": {key: value for key, value in older.items() if key != "hidden_size"}})


def test_a_plain_model_extended_by_yarn_says_its_own_length(tmp_path):
    LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    model = {"init_from": str(tmp_path), "rotary_scaling": "yarn", "rotary_scaling_factor": 4.0}
    values = {
        "run": {"dir": "unused"},
        "model": model,
        "data": {"train": "unused", "tokenizer": "unused", "sequence_length": LENGTH},
        "training": {"steps": 10, "global_batch_size": 4},
        "optimizer": {"lr": 1e-3},
        "attention": {"kind": "full"},
    }
    assert config_from_dict(values).model.rotary_original_length == 128
    assert (
        config_from_dict({**values, "model": {**model, "rotary_original_length": 64}}).model.rotary_original_length
        == 64
    )
