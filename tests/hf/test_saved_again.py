"""What is saved of a MoBA model, and copies of it, attend by MoBA again, in every way that models are made."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from hf_examples import build, close, tokens
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import moba_megatron.hf as hf

DOUBLE = {"dtype": torch.float64}


@pytest.fixture
def folder(tmp_path):
    build().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def by_state(make):
    """A model made from a configuration alone, with the weights of a folder."""

    def load(folder):
        model = make(AutoConfig.from_pretrained(folder)).double()
        model.load_state_dict(AutoModelForCausalLM.from_pretrained(folder, **DOUBLE).state_dict())
        return model

    return load


def configuration_alone(folder):
    """`model.config.save_pretrained`, with the weights put beside it."""
    other = folder.parent / "config"
    AutoModelForCausalLM.from_pretrained(folder).config.save_pretrained(other)
    shutil.copy(folder / "model.safetensors", other)
    return AutoModelForCausalLM.from_pretrained(other, **DOUBLE)


def twice(folder):
    AutoModelForCausalLM.from_pretrained(folder, **DOUBLE).save_pretrained(folder.parent / "again")
    return AutoModelForCausalLM.from_pretrained(folder.parent / "again", **DOUBLE)


def saved_while_full(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", **DOUBLE)
    model.save_pretrained(folder.parent / "full")
    return AutoModelForCausalLM.from_pretrained(folder.parent / "full", **DOUBLE)


WAYS = {
    "AutoModel": lambda folder: AutoModelForCausalLM.from_pretrained(folder, **DOUBLE),
    "the class": lambda folder: LlamaForCausalLM.from_pretrained(folder, **DOUBLE),
    "no name asked": lambda folder: AutoModelForCausalLM.from_pretrained(folder, attn_implementation=None, **DOUBLE),
    "a configuration given": lambda folder: LlamaForCausalLM.from_pretrained(
        folder, config=AutoConfig.from_pretrained(folder), **DOUBLE
    ),
    "from_config": by_state(AutoModelForCausalLM.from_config),
    "constructor": by_state(LlamaForCausalLM),
    "dictionary": by_state(lambda config: LlamaForCausalLM(LlamaConfig.from_dict(config.to_dict()))),
    "copied configuration": by_state(lambda config: LlamaForCausalLM(copy.deepcopy(config))),
    "copied model": lambda folder: copy.deepcopy(LlamaForCausalLM.from_pretrained(folder, **DOUBLE)),
    "configuration saved alone": configuration_alone,
    "saved twice": twice,
    "saved while full": saved_while_full,
}


@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_it_attends_by_moba(folder, way, named):
    """Also where config.json does not name the attention, as transformers alone writes it."""
    if not named:
        edit(folder, lambda values: values.pop("attn_implementation"))
    model = WAYS[way](folder).eval()
    assert model.config._attn_implementation == hf.NAME
    close(model(tokens(45)).logits, build()(tokens(45)).logits)


def edit(folder, change):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_another_attention_that_is_asked_for_holds(folder, name):
    config = AutoConfig.from_pretrained(folder)
    models = [
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation=name),
        LlamaForCausalLM.from_pretrained(folder, attn_implementation=name),
        AutoModelForCausalLM.from_config(config, attn_implementation=name),
    ]
    models.append(copy.deepcopy(models[0]))
    assert [model.config._attn_implementation for model in models] == [name] * 4


def test_other_heads_attend_by_moba_too(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config._attn_implementation == hf.NAME


def test_models_without_settings_are_left_alone():
    model = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    assert model.config._attn_implementation == "sdpa" and "attn_implementation" not in model.config.to_dict()


def test_without_this_package_it_does_not_load(folder):
    code = f"""
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({str(folder)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and 'attn_implementation="moba"` is not supported' in done.stderr


def test_classes_that_take_no_attention_by_name_are_refused():
    config = BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)
    model = BloomForCausalLM(copy.deepcopy(config))
    with pytest.raises(ValueError, match="the code of BloomForCausalLM does not seem to use"):
        hf.configure(model, block_size=4, top_k=2)
    assert not hasattr(model.config, "moba_config")
    config.moba_config = hf.MoBASettings(4, 2, ("moba", "moba")).to_config()
    with pytest.raises(ValueError, match="the code of BloomForCausalLM does not seem to use"):
        BloomForCausalLM(copy.deepcopy(config))
    assert BloomForCausalLM._from_config(config, attn_implementation="eager").config._attn_implementation == "eager"


def test_asking_for_weights_of_attention_is_no_way_to_full_attention(folder):
    edit(folder, lambda values: values.pop("attn_implementation"))
    with pytest.raises(ValueError, match="output_attentions = True.*no matrix of weights"):
        AutoModelForCausalLM.from_pretrained(folder, output_attentions=True)
