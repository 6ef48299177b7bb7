"""Import and export keep every bit, and what is exported is, for transformers, the model that was trained."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from distributed import run_ranks
from huggingface_models import MODELS
from safetensors.torch import load_file
from small_run import TOKENS, small_config, train_here
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from moba_megatron.checkpoint import CheckpointError, Manifest
from moba_megatron.checkpoint.find import find_checkpoint, saved_config
from moba_megatron.config import ConfigError, load_config
from moba_megatron.config.huggingface import model_section, read_huggingface_config
from moba_megatron.convert.export_hf import export_huggingface
from moba_megatron.convert.exported import open_exported
from moba_megatron.convert.import_hf import import_huggingface
from moba_megatron.convert.model_card import model_card
from moba_megatron.convert.publish import new_folder
from moba_megatron.convert.tokenizer_files import complete_tokenizer_config, tokenizer_class
from moba_megatron.convert.verify import Comparison, verify
from moba_megatron.corpus.tokenizer import Tokenizer, train_bpe
from moba_megatron.model.schedule import AttentionSchedule
from moba_megatron.training.resume import find_resume


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_tensors(one: Path, other: Path) -> None:
    before, after = tensors(one), tensors(other)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


@pytest.fixture(scope="module")
def imported(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")

    def import_here(name: str) -> None:
        import_huggingface(models[name].folder, folder / name)

    for name in MODELS:
        run_ranks(1, import_here, name)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_import_and_export_keep_every_bit_and_every_logit(models, imported, tmp_path, name):
    export_huggingface(open_exported(imported / name), tmp_path / "out", shard_bytes=60_000)
    assert_same_tensors(models[name].folder, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    before, after = (model_section(read_huggingface_config(f)) for f in (models[name].folder, tmp_path / "out"))
    assert before == after
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="sdpa")
    for ids, expected in zip(models[name].texts, models[name].logits, strict=True):
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected)


def test_an_imported_model_is_a_run_to_start_from(models, imported):
    config = load_config(imported / "llama-3.1/config.yaml")
    assert config.model.init_from == str((imported / "llama-3.1").resolve())
    assert (config.attention.kind, config.data.sequence_length, config.training.precision) == ("full", 128, "fp32")
    assert config.run.dir == "runs/llama-3.1-trained"
    command = (imported / "llama-3.1/config.yaml").read_text().splitlines()[2]
    assert f"train.py {imported}/llama-3.1/config.yaml run.dir=runs/llama-3.1-trained data.train=PREFIX" in command


def test_an_import_is_no_run_to_resume(imported):
    folder = imported / "llama-3.1"
    config = load_config(folder / "config.yaml", [f"run.dir={folder}"])
    schedule = AttentionSchedule.from_config(config.attention, config.model.num_layers)
    with pytest.raises(ConfigError, match=f"choose another run.dir than .* with model.init_from={folder}$"):
        find_resume(config, schedule, {})


EXTENDED = {
    "model__rotary_scaling": "llama3",
    "model__rotary_scaling_factor": 4.0,
    "model__rotary_original_length": 32,
    "model__rotary_interpolation": 8.0,
    "model__qk_layernorm": True,
    "model__share_embeddings_and_output_weights": True,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A hybrid MoBA model on top of interpolated llama3 positions, trained at TP 2 x PP 2."""
    folder = tmp_path_factory.mktemp("trained")
    config = small_config(folder, training__steps=3, parallel__tensor=2, parallel__pipeline=2, **EXTENDED)
    run_ranks(4, train_here, config, 4)
    return Path(config.run.dir)


def test_a_trained_checkpoint_is_the_same_model_in_transformers(trained, tmp_path):
    exported = open_exported(trained)
    export_huggingface(exported, tmp_path / "out", decode="moba")
    (found,) = run_ranks(1, verify, exported, tmp_path / "out")
    assert [text.name for text in found] == [
        "random tokens",
        "real tokens",
        "past the original length",
        "under MoBA (median token)",
    ]
    assert all(text.relative < 1e-5 and text.tokens > 10 for text in found), found
    moba = json.loads((tmp_path / "out/config.json").read_text())["moba_config"]
    assert moba == {
        "block_size": 16,
        "top_k": 3,
        "layer_types": ["moba", "moba", "moba", "full"],
        "decode": "moba",
        "version": 1,
    }


def test_the_gate_notices_what_weights_cannot_show(trained, tmp_path):
    exported = open_exported(trained)
    export_huggingface(exported, tmp_path / "out")
    path = tmp_path / "out/config.json"
    right = path.read_text()

    def gate(**changes) -> float:
        path.write_text(json.dumps({**json.loads(right), **changes}))
        (found,) = run_ranks(1, verify, exported, tmp_path / "out")
        return max(text.relative for text in found)

    assert gate(rms_norm_eps=1e-6) > 1e-5
    assert gate(rope_scaling=None, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}) > 1e-5


def test_the_gate_reads_more_than_moba_covers(trained, tmp_path, monkeypatch):
    """Up to 48 tokens this MoBA is full attention, whatever its sizes, so a shorter text would prove nothing."""
    monkeypatch.setattr("moba_megatron.convert.verify._LONGEST", 40)
    exported = open_exported(trained)
    export_huggingface(exported, tmp_path / "out")
    path = tmp_path / "out/config.json"
    values = json.loads(path.read_text())

    def gate(top_k: int) -> Comparison:
        path.write_text(json.dumps({**values, "moba_config": {**values["moba_config"], "top_k": top_k}}))
        (found,) = run_ranks(1, verify, exported, tmp_path / "out")
        assert [text.tokens <= 40 for text in found] == [False, True, True, False]
        return found[-1]

    assert gate(3).relative < 1e-5 < gate(4).relative
    assert gate(3).tokens == 48 + 128


def test_an_export_brings_tokenizer_generation_settings_and_card(trained, tmp_path):
    exported = open_exported(trained)
    export_huggingface(exported, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("w5 w6", add_special_tokens=False).input_ids == exported.tokenizer.encode_batch(["w5 w6"])[0]
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == exported.tokenizer.eod_id
    card = (tmp_path / "out/README.md").read_text()
    for expected in (
        "**Engines that do not know `moba_config`",
        "Up to 48 tokens",
        "| tokens | 1,536 |",
        "3 of 4 layers",
    ):
        assert expected in card


@pytest.mark.parametrize(("kind", "reader"), [("llama", "AutoTokenizer"), ("qwen2", "PreTrainedTokenizerFast")])
def test_the_class_that_reads_a_tokenizer_is_found(tmp_path, kind, reader):
    """transformers 5 builds Qwen's own tokenizer for every model of that type, with other ids."""
    folder = Path(shutil.copytree(TOKENS / "tokenizer", tmp_path / kind))
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    complete_tokenizer_config(folder, "<|endoftext|>")
    tokenizer = Tokenizer(folder)
    assert tokenizer_class(folder, tokenizer) == reader
    right = getattr(transformers, reader).from_pretrained(folder)
    assert right("w5 w6", add_special_tokens=False).input_ids == tokenizer.encode_batch(["w5 w6"])[0] == [5, 6]


def qwen_like(folder: Path, *merges: str, normalizer: str | None = "NFC") -> Tokenizer:
    """A tokenizer in a Qwen 2's folder that differs from Qwen's in how it cuts digits alone, with these merges."""
    backend = train_bpe(["text"] * 9, 258, folder).backend
    values = json.loads(backend.to_str())
    values["normalizer"] = {"type": normalizer} if normalizer else None
    values["model"]["merges"] = [list(merge.split()) for merge in merges]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    entries = [*alphabet, *(merge.replace(" ", "") for merge in merges), "<|endoftext|>"]
    values["model"]["vocab"] = {entry: number for number, entry in enumerate(entries)}
    values["added_tokens"][0]["id"] = len(entries) - 1
    (folder / "tokenizer.json").write_text(json.dumps(values))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    complete_tokenizer_config(folder, "<|endoftext|>")
    return Tokenizer(folder)


@pytest.mark.parametrize(
    ("merge", "normalizer", "reader"),
    [
        ("0 0", "NFC", "PreTrainedTokenizerFast"),
        ("2 2", "NFC", "PreTrainedTokenizerFast"),
        ("Ġ w", None, "PreTrainedTokenizerFast"),
        ("Ġ w", "NFKC", "PreTrainedTokenizerFast"),
        ("Ġ w", "Lowercase", "PreTrainedTokenizerFast"),
        ("7 x", "NFC", "AutoTokenizer"),
        ("Ġ Ġ", "NFC", "AutoTokenizer"),
        ("Ċ Ċ", "NFC", "AutoTokenizer"),
    ],
)
def test_readers_that_part_on_few_texts_are_told_apart(tmp_path, merge, normalizer, reader):
    tokenizer = qwen_like(tmp_path, merge, normalizer=normalizer)
    assert tokenizer_class(tmp_path, tokenizer) == reader
    right = getattr(transformers, reader).from_pretrained(tmp_path)
    for text in ("100 200", "x22", "7x", "\n\n \n\n", "    w", "e\u0301 ﬁ A", "<|endoftext|>  w\n\n1"):
        assert right(text, add_special_tokens=False).input_ids == tokenizer.encode_batch([text])[0], text


def test_a_tokenizer_that_no_class_reads_is_refused(tmp_path):
    """A setting beside tokenizer.json that transformers heeds and training did not."""
    tokenizer = qwen_like(tmp_path, "Ġ w")
    values = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**values, "pad_token": "lines"}))
    with pytest.raises(ConfigError, match="no class of transformers .*AutoTokenizer reads .*lines.* otherwise"):
        tokenizer_class(tmp_path, tokenizer)


def test_without_the_attention_a_moba_export_does_not_load(trained, tmp_path):
    """A load that would silently attend fully must fail instead; in a process that has not registered it."""
    export_huggingface(open_exported(trained), tmp_path / "out")

    def load() -> str:
        from transformers import AttentionInterface

        AttentionInterface._global_mapping.pop("moba", None)
        try:
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        except ValueError as error:
            return str(error)
        return "loaded"

    assert "moba" in run_ranks(1, load, prepare=False)[0]


def test_a_moba_export_comes_back_as_a_moba_run(trained, tmp_path):
    export_huggingface(open_exported(trained), tmp_path / "out")
    run_ranks(1, lambda: import_huggingface(tmp_path / "out", tmp_path / "back"))
    attention = load_config(tmp_path / "back/config.yaml").attention
    assert (attention.kind, attention.block_size, attention.top_k, attention.full_layers) == ("moba", 16, 3, [4])
    export_huggingface(open_exported(tmp_path / "back"), tmp_path / "again")
    assert_same_tensors(tmp_path / "out", tmp_path / "again")


def test_layers_of_several_sizes_are_exported_and_come_back(tmp_path):
    layers = {1: {"block_size": 8, "top_k": 5}}
    config = small_config(tmp_path, training__steps=3, attention__layers=layers, model__init_method_std=0.2)
    run_ranks(1, train_here, config)
    exported = open_exported(config.run.dir)
    export_huggingface(exported, tmp_path / "out")
    moba = json.loads((tmp_path / "out/config.json").read_text())["moba_config"]
    assert (moba["block_size"], moba["layer_sizes"]) == (16, {"0": {"block_size": 8, "top_k": 5}})
    (found,) = run_ranks(1, verify, exported, tmp_path / "out")
    assert found[-1].name == "under MoBA (median token)" and found[-1].relative < 1e-5
    card = (tmp_path / "out/README.md").read_text()
    assert "2 past blocks of 16 tokens whose mean key fits it best (layer 1: 4 of 8)" in card
    assert "Up to 40 tokens" in card
    run_ranks(1, lambda: import_huggingface(tmp_path / "out", tmp_path / "back"))
    back = load_config(tmp_path / "back/config.yaml").attention
    assert (back.layers[1].block_size, back.layers[1].top_k, back.full_layers) == (8, 5, [4])


def test_two_exports_to_one_place_do_not_meet(trained, tmp_path):
    exported, out = open_exported(trained), tmp_path / "out"

    def second() -> str:
        with pytest.raises(ConfigError) as error:
            export_huggingface(exported, out)
        return str(error.value)

    with new_folder(out) as unfinished:
        (unfinished / "file").write_text("of the first")
        (refused,) = run_ranks(1, second, prepare=False)
    assert f"{out} is being written by process {os.getpid()} on" in refused
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and [path.name for path in out.iterdir()] == ["file"]


def test_the_card_of_a_run_whose_length_changed_tells_the_tokens_it_read(trained):
    exported = open_exported(trained)
    manifest = replace(exported.manifest, consumed_tokens=999_000)
    values = {"architectures": ["LlamaForCausalLM"]}
    assert "| tokens | 999,000 |" in model_card("name", replace(exported, manifest=manifest), values, None)


def test_a_checkpoint_opens_where_the_backends_of_its_training_are_not(trained, tmp_path):
    checkpoint = Path(shutil.copytree(find_checkpoint(trained), tmp_path / "step_3"))
    manifest = Manifest.read(checkpoint)
    elsewhere = {**manifest.config["attention"], "backend": "triton", "full_backend": "cudnn"}
    replace(manifest, config={**manifest.config, "attention": elsewhere}).write(checkpoint)
    attention = saved_config(checkpoint).attention
    assert (attention.backend, attention.full_backend) == ("auto", "auto")
    assert attention.block_size == manifest.config["attention"]["block_size"]


def test_a_damaged_checkpoint_is_not_exported(trained, tmp_path):
    copy = Path(shutil.copytree(trained / "checkpoints/step_3", tmp_path / "step_3"))
    shard = next(copy.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"is damaged: {shard.name}"):
        export_huggingface(open_exported(copy), tmp_path / "out")


def test_nothing_is_overwritten_and_nothing_half_written_stays(models, trained, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("")
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        export_huggingface(open_exported(trained), tmp_path / "out")
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        import_huggingface(models["llama"].folder, tmp_path / "out")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_huggingface(open_exported(trained), tmp_path / "half", advance=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
