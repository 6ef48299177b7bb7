"""The engine gives what generation by the definition gives, from a checkpoint and from its Hugging Face export."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed import run_ranks
from small_run import begin_texts, copy_tokens, small_config, train_here
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaAttention

from moba_megatron.convert.export_hf import export_huggingface
from moba_megatron.convert.exported import open_exported
from moba_megatron.corpus.tokenizer import text_start
from moba_megatron.generation.engine import continue_prompt
from moba_megatron.generation.loading import load_generator, load_tokenizer

PROMPT = [3 + 7 * i * i % 29 for i in range(100)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = small_config(tmp_path_factory.mktemp("trained"), training__steps=4, model__init_method_std=0.3)
    run_ranks(1, train_here, config)
    return Path(config.run.dir)


@pytest.fixture(scope="module")
def exported(run):
    out = run.parent / "exported"
    export_huggingface(open_exported(run), out, decode="moba")
    return out


@torch.no_grad()
def by_definition(run, new_tokens):
    """The best tokens of the Megatron model, each by a pass over the whole text, padding of the vocabulary left out."""
    from moba_megatron.corpus.tokenizer import Tokenizer
    from moba_megatron.generation.loading import open_model

    tokenizer = Tokenizer(Path(run).parent / "tokens/tokenizer")
    opened = open_model(run, tokenizer.fingerprint, tokenizer.vocab_size)
    text = list(PROMPT)
    for _ in range(new_tokens):
        logits = opened.model[0](torch.tensor([text]), torch.arange(len(text)).unsqueeze(0), attention_mask=None)
        text.append(int(logits[0, -1, : tokenizer.vocab_size].argmax()))
    return text[len(PROMPT) :]


SETTINGS = {"max_new_tokens": 40, "temperature": 0.0}


def test_a_checkpoint_generates_by_the_definition(run, exported):
    want = run_ranks(1, by_definition, run, SETTINGS["max_new_tokens"])[0]
    assert len(set(want)) > 5
    for source in (run, exported):
        model = load_generator(source, "moba").model
        assert list(continue_prompt(model, PROMPT, **SETTINGS)) == want
        assert list(continue_prompt(model, PROMPT, prefill_tokens=23, **SETTINGS)) == want


def test_sampling_and_full_decoding_agree_between_checkpoint_and_export(run, exported):
    for settings in ({"temperature": 1.0, "seed": 3, "max_new_tokens": 30}, SETTINGS):
        both = [list(continue_prompt(load_generator(x, "full").model, PROMPT, **settings)) for x in (run, exported)]
        assert both[0] == both[1] and len(both[0]) == settings["max_new_tokens"]


def test_decode_modes_differ_after_the_first_token(run):
    logits = []
    for decode in ("full", "moba"):
        model = load_generator(run, decode).model
        with torch.no_grad():
            first = model(torch.tensor([PROMPT]), use_cache=True)
            logits += [first.logits, model(torch.tensor([[5]]), past_key_values=first.past_key_values).logits]
    assert torch.equal(logits[0], logits[2])
    assert (logits[1] - logits[3]).abs().max() > 1e-4


def test_stop_tokens_end_and_are_left_out(run):
    model = load_generator(run).model
    text = list(continue_prompt(model, PROMPT, **SETTINGS))
    stop = text[7]
    assert list(continue_prompt(model, PROMPT, stop_ids=[stop], **SETTINGS)) == text[: text.index(stop)]


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"prompt": []}, {"prefill_tokens": 2}])
def test_wrong_settings_are_refused(run, wrong):
    arguments = {"prompt": [1], "max_new_tokens": 1, **wrong}
    with pytest.raises(ValueError, match=r"temperature|top_p|prompt|piece"):
        list(continue_prompt(load_generator(run).model, **arguments))


def test_a_model_without_moba_layers_has_no_decode_mode(exported, tmp_path):
    for file in exported.iterdir():
        (tmp_path / file.name).symlink_to(file)
    values = json.loads((exported / "config.json").read_text())
    del values["moba_config"], values["attn_implementation"]
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load_generator(tmp_path).attention == "full attention in all layers"
    with pytest.raises(ValueError, match="no MoBA layers"):
        load_generator(tmp_path, "moba")


def test_a_folder_that_names_moba_but_has_no_sizes_is_refused(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "out")
    values = json.loads((exported / "config.json").read_text())
    del values["moba_config"]
    (tmp_path / "out/config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="has no moba_config"):
        load_generator(tmp_path / "out")


def test_a_model_that_does_not_come_to_moba_is_refused(exported, monkeypatch):
    """As a class of transformers would that does not take its attention from the interface."""
    layer = LlamaAttention.forward

    def own_attention(self, *args, **kwargs):
        if self.layer_idx == 1:
            return args[0] if args else kwargs["hidden_states"], None
        return layer(self, *args, **kwargs)

    monkeypatch.setattr(LlamaAttention, "forward", own_attention)
    with pytest.raises(ValueError, match=r"layers \[1\] .* of LlamaForCausalLM do not attend by MoBA"):
        load_generator(exported)
    monkeypatch.undo()
    assert load_generator(exported).attention.startswith("MoBA in 3 of 4 layers")


@pytest.mark.parametrize("bias", [False, True], ids=["llama", "qwen2"])
def test_prompts_get_the_ids_that_training_had(tmp_path, bias):
    """transformers' automatic choice builds another tokenizer for Qwen 2."""
    config = small_config(tmp_path, training__steps=3, model__add_qkv_bias=bias)
    run_ranks(1, train_here, config)
    export_huggingface(open_exported(config.run.dir), tmp_path / "out")
    both = [load_generator(source) for source in (Path(config.run.dir), tmp_path / "out")]
    assert [x.encode("w5 w6 w7") for x in both] == [[5, 6, 7]] * 2
    assert [list(x.stop_ids) for x in both] == [[0]] * 2
    assert [x.decode([5, 6]) for x in both] == ["w5w6"] * 2


def test_prompts_and_stops_are_those_of_transformers(tmp_path):
    """With a template for the beginning of a text, and generation settings that name several ends."""
    tokenizer = copy_tokens(tmp_path) / "tokenizer"
    begin_texts(tokenizer)
    config = small_config(tmp_path, training__steps=3, model__init_method_std=0.3)
    run_ranks(1, train_here, config)
    trained, out = Path(config.run.dir), tmp_path / "out"
    free = load_generator(trained, "moba")
    text = list(continue_prompt(free.model, free.encode("w5 w6 w7"), **SETTINGS))
    want, end = text[:2], text[2]
    assert not {0, end} & set(want) and end != 0
    (trained / "tokenizer/generation_config.json").write_text(
        json.dumps({"eos_token_id": [0, end], "do_sample": False})
    )
    export_huggingface(open_exported(trained), out, decode="moba")

    prompt = AutoTokenizer.from_pretrained(out)("w5 w6 w7", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(out)
    theirs = model.generate(**prompt, max_new_tokens=40)[0].tolist()
    assert theirs == [2, 5, 6, 7, *want, end]
    for source in (trained, out):
        found = load_generator(source, "moba")
        assert found.encode("w5 w6 w7") == [2, 5, 6, 7] and found.encode("") == [2]
        assert list(found.stop_ids) == [0, end]
        assert found.decode([2, 5, 6]) == "w5w6"
        settings = {**SETTINGS, "stop_ids": found.stop_ids}
        assert list(continue_prompt(found.model, found.encode("w5 w6 w7"), **settings)) == want


def test_a_prompt_stays_open_where_a_template_ends_texts(tmp_path):
    tokenizer = copy_tokens(tmp_path) / "tokenizer"
    begin_texts(tokenizer, "w2 $A w3")
    assert load_tokenizer(tokenizer)("w5").input_ids == [2, 5, 3]
    assert text_start(load_tokenizer(tokenizer)) == [2]


def test_the_command_streams_the_same_text_from_both(run, exported):
    command = [str(Path(sys.executable).with_name("moba-megatron")), "generate"]
    options = ["--prompt", "w5 w6 w7", "--tokens", "12", "--temperature", "0", "--decode", "moba"]
    done = [
        subprocess.run([*command, str(x), *options], capture_output=True, text=True, timeout=120)
        for x in (run, exported)
    ]
    assert [x.returncode for x in done] == [0, 0], done[0].stderr + done[1].stderr
    assert done[0].stdout.replace(" ", "") == done[1].stdout.replace(" ", "") and done[0].stdout.startswith("w5w6w7")
    assert "MoBA in 3 of 4 layers, block_size = 16, top_k = 3, decode = moba" in done[0].stderr
