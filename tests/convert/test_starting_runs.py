"""A run that starts from a Hugging Face model: the same first loss at every layout, from the folder or its import; and
each rank reads no more than its part."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from distributed import run_ranks
from huggingface_models import LLAMA3, SIZES, save_model
from small_run import TOKENS, read_metrics, small_config, train_here
from test_logits import configuration
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from moba_megatron.cli import app
from moba_megatron.config import Config, ConfigError, config_from_dict, load_config
from moba_megatron.convert.initial import check_initial_weights
from moba_megatron.corpus.prepare import prepare
from moba_megatron.corpus.recipe import recipe_from_dict
from moba_megatron.corpus.tokenizer import Tokenizer, copy_tokenizer
from moba_megatron.data.datasets import build_datasets
from moba_megatron.data.feed import rank_batches
from moba_megatron.generation.loading import load_generator
from moba_megatron.training.preflight import preflight

ENTRIES = 128


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Llama with llama3 rope, with the tokenizer of the synthetic tokens."""
    folder = tmp_path_factory.mktemp("source") / "llama"
    save_model(folder, LlamaConfig(**{**SIZES, "vocab_size": ENTRIES, "rope_parameters": LLAMA3}))
    shutil.copytree(TOKENS / "tokenizer", folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def imported(source, tmp_path_factory):
    """The same, imported by the command, which compares it with transformers."""
    out = tmp_path_factory.mktemp("imported") / "llama"
    output = call("import-hf", source, out, "--verify")
    assert "verified" in output and "past the original length" in output and "real tokens" in output
    return out


def call(*arguments: object, code: int = 0) -> str:
    """What the command says, run in a process of its own."""

    def command() -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return result.exit_code, result.output

    ((exit_code, output),) = run_ranks(1, command, prepare=False)
    assert exit_code == code, output
    return output


def start(source: Path, folder: Path, **changes: Any) -> Config:
    changes = {"training__steps": 3, "attention__kind": "full", "model__init_from": str(source), **changes}
    values = small_config(folder).model_dump(mode="json")
    values["model"] = {}
    for name, value in changes.items():
        section, key = name.split("__")
        values[section][key] = value
    return config_from_dict(values)


def test_the_first_loss_is_that_of_the_model_at_every_layout(source, imported, tmp_path):
    base = {"data__cross_document_attention": True, "training__micro_batch_size": 1}
    one = start(source, tmp_path / "one", **base)

    def first_batch() -> list[dict[str, torch.Tensor]]:
        from moba_megatron.platform import start_model_parallel

        start_model_parallel(one.parallel)
        batches = rank_batches(
            build_datasets(one)[0], one, eod_id=0, consumed_samples=0, num_samples=4, device=torch.device("cpu")
        )
        return [next(batches) for _ in range(4)]

    (samples,) = run_ranks(1, first_batch)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    with torch.no_grad():
        losses = [F.cross_entropy(model(s["tokens"]).logits[0], s["labels"][0], reduction="none") for s in samples]
    counted = torch.cat([s["loss_mask"][0] for s in samples])
    expected = float((torch.cat(losses) * counted).sum() / counted.sum())
    cases = [
        (1, "one", source, {}),
        (2, "tensor", source, {"parallel__tensor": 2, "parallel__distributed_optimizer": True}),
        (4, "pipeline-context", source, {"parallel__pipeline": 2, "parallel__context": 2}),
        (
            2,
            "chunks",
            source,
            {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "parallel__pipeline_layers": [2, 0, 1, 1]},
        ),
        (2, "imported", imported, {"parallel__pipeline": 2}),
    ]
    courses = []
    for ranks, name, origin, layout in cases:
        config = start(origin, tmp_path / name, **base, **layout)
        run_ranks(ranks, train_here, config, ranks)
        courses.append([line["loss"] for line in read_metrics(Path(config.run.dir))])
        assert courses[-1][0] == pytest.approx(expected, rel=2e-6), name
        assert courses[-1][2] == pytest.approx(courses[0][2], rel=1e-4), name


def test_which_token_ends_documents_makes_no_other_tokenizer(source, imported, tmp_path):
    own = copy_tokenizer(TOKENS / "tokenizer", tmp_path / "tokenizer", "w9")
    assert own.fingerprint != Tokenizer(TOKENS / "tokenizer").fingerprint
    for origin in (source, imported, imported / "checkpoints/step_0"):
        config = start(origin, tmp_path, data__tokenizer=str(own.folder))
        check_initial_weights(config, ENTRIES)
    path = own.folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"w5"', '"other"'))
    for origin in (source, imported):
        with pytest.raises(ConfigError, match="is not the tokenizer of model.init_from"):
            check_initial_weights(start(origin, tmp_path, data__tokenizer=str(own.folder)), ENTRIES)


def test_data_that_do_not_begin_as_the_tokenizer_begins_texts_are_told_of(source, tmp_path):
    tokenizer = Path(shutil.copytree(TOKENS / "tokenizer", tmp_path / "tokenizer"))
    config = start(source, tmp_path, data__tokenizer=str(tokenizer))
    assert not [line for line in check_initial_weights(config, ENTRIES) if "begin_of_document" in line]
    backend = Tokenizer(tokenizer).backend
    backend.add_special_tokens(["w7"])
    backend.post_processor = TemplateProcessing(single="w7 $A", special_tokens=[("w7", backend.token_to_id("w7"))])
    (model := tmp_path / "model").mkdir()
    for path in source.iterdir():
        (model / path.name).symlink_to(path)
    for folder in (tokenizer, model):
        (folder / "tokenizer.json").unlink()
        backend.save(str(folder / "tokenizer.json"))
    (line,) = [
        line
        for line in check_initial_weights(start(model, tmp_path, data__tokenizer=str(tokenizer)), ENTRIES)
        if "begin_of_document" in line
    ]
    assert "its documents do not begin with 'w7'" in line and line.endswith("'tokenizer.begin_of_document=w7'")
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "w5 w6 w8"}\n')
    recipe = {
        "sources": [{"kind": "jsonl", "path": str(data)}],
        "tokenizer": {"kind": "pretrained", "path": str(tokenizer), "begin_of_document": "w7"},
        "split": {"validation": 0},
    }
    prepare(recipe_from_dict(recipe), tmp_path / "data", workers=1)
    config = start(model, tmp_path, data__tokenizer=str(tokenizer), data__train=str(tmp_path / "data/train"))
    assert not [line for line in check_initial_weights(config, ENTRIES) if "begin_of_document" in line]


def test_a_start_names_the_folder_of_its_weights(source, imported, tmp_path):
    assert preflight(start(source, tmp_path / "a"), 1).weights == f"weights: from {source} (Hugging Face, F32)"
    step_0 = f"weights: from checkpoint {imported}/checkpoints/step_0, step 0"
    assert preflight(start(imported, tmp_path / "b"), 1).weights == step_0


def test_a_resumed_run_does_not_read_its_source_again(source, tmp_path):
    copy = Path(shutil.copytree(source, tmp_path / "model"))
    run_ranks(1, train_here, start(copy, tmp_path, training__stop_after=1, checkpoint__every=1))
    resumed = start(copy, tmp_path)
    shutil.rmtree(copy)
    assert run_ranks(1, train_here, resumed) == [("finished", 3)]


@pytest.fixture(scope="module")
def shortened(source, tmp_path_factory):
    """A run on sequences of 128 tokens, from a model that was made for 1024."""
    folder = tmp_path_factory.mktemp("shortened")
    copy = Path(shutil.copytree(source, folder / "model"))
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(re.sub(r'("max_position_embeddings": )\d+', r"\g<1>1024", text))
    config = start(copy, folder, training__stop_after=1, checkpoint__every=1)
    run_ranks(1, train_here, config)
    return config


def window_of(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["max_position_embeddings"]


def test_an_export_keeps_the_window_of_the_model_it_started_from(shortened, tmp_path):
    run = Path(shortened.run.dir)
    assert load_config(run / "config.yaml").model.max_position_embeddings == 1024
    call("export-hf", run, tmp_path / "out")
    call("export-hf", run, tmp_path / "asked", "--length", 256)
    assert (window_of(tmp_path / "out"), window_of(tmp_path / "asked")) == (1024, 256)
    assert load_generator(run).model.config.max_position_embeddings == 1024
    # What is trained on more takes more; a run hands on what it was made for, and what it was trained on.
    assert start(shortened.model.init_from, tmp_path, data__sequence_length=2048).window == 2048
    assert start(run, tmp_path).window == 1024
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["model"]["max_position_embeddings"], values["data"]["sequence_length"] = None, 512
    (tmp_path / "longer").mkdir()
    (tmp_path / "longer/config.yaml").write_text(yaml.safe_dump(values))
    assert start(tmp_path / "longer", tmp_path).window == 512


def test_tasks_may_be_as_long_as_the_window(shortened):
    run = shortened.run.dir
    asked = (run, "--tasks", "needle", "--depths", "0", "--task-samples", 1)
    assert "needle" in call("evaluate", *asked, "--lengths", 700)
    assert "over the model's window of 1024 tokens" in call("evaluate", *asked, "--lengths", 1025, code=2)
    call("evaluate", *asked)
    found = json.loads((Path(run) / "evaluation/tasks_step_1_full.json").read_text())
    assert (found["lengths"], found["window"]) == ([128], 1024)


def test_configurations_older_than_the_window_still_load(shortened, tmp_path):
    """Where it is not written it is taken from the source, and nothing is missed where the source is gone."""
    run = Path(shutil.copytree(shortened.run.dir, tmp_path / "run"))
    lines = (run / "config.yaml").read_text().splitlines(keepends=True)
    old = "".join(line for line in lines if "max_position_embeddings" not in line)
    (run / "config.yaml").write_text(old)
    assert load_config(run / "config.yaml").window == 1024
    (run / "config.yaml").write_text(old.replace(str(shortened.model.init_from), str(tmp_path / "gone")))
    assert load_config(run / "config.yaml").window == 128
    manifest = run / "checkpoints/step_1/checkpoint.json"
    values = json.loads(manifest.read_text())
    del values["config"]["model"]["max_position_embeddings"], values["blake2b"]
    manifest.write_text(json.dumps(values))
    resumed = load_config(run / "config.yaml", [f"run.dir={run}", f"model.init_from={shortened.model.init_from}"])
    assert preflight(resumed, 1).resume == run / "checkpoints/step_1"


def test_an_imported_model_generates_evaluates_and_is_exported(imported, tmp_path):
    assert call("generate", imported, "--prompt", "w5 w6", "--tokens", 3, "--temperature", 0)
    assert "validation loss" in call("evaluate", imported, "--validation", copied_tokens(tmp_path), "--samples", 4)
    assert "verified" in call("export-hf", imported, tmp_path / "out", "--verify")
    assert "nothing is overwritten" in call("export-hf", imported, tmp_path / "out", code=2)
    assert "no config.json" in call("import-hf", tmp_path, tmp_path / "in", code=2)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A Llama in F16, made for 64 tokens."""
    folder = tmp_path_factory.mktemp("half") / "llama"
    save_model(
        folder, LlamaConfig(**{**SIZES, "vocab_size": ENTRIES, "max_position_embeddings": 64}), dtype=torch.float16
    )
    shutil.copytree(TOKENS / "tokenizer", folder, dirs_exist_ok=True)
    return folder


def test_f16_weights_train_in_bf16_and_both_ways_in_say_so(half, tmp_path):
    folder_of_run = tmp_path / "direct"
    run_ranks(1, train_here, start(half, folder_of_run, training__precision="bf16"))
    assert "F16 weights are rounded to bf16" in (folder_of_run / "run/config.yaml").read_text()
    assert "note: the import keeps F16 weights unchanged in fp32" in call(
        "import-hf", half, tmp_path / "imported", "--verify"
    )
    assert load_config(tmp_path / "imported/config.yaml").training.precision == "bf16"
    exact = call("export-hf", tmp_path / "imported", tmp_path / "out", "--verify")
    assert "verified" in exact
    run_ranks(1, train_here, start(tmp_path / "imported", tmp_path / "second", training__precision="bf16"))
    losses = [[line["loss"] for line in read_metrics(tmp_path / name / "run")] for name in ("direct", "second")]
    assert losses[0] == losses[1]


def test_training_past_the_window_of_the_source_is_said_unless_its_positions_change(half, tmp_path):
    window = "is longer than the"

    def lines(**changes: Any) -> str:
        return "\n".join(preflight(start(half, tmp_path, **changes), 1).choices)

    said = lines()
    assert f"data.sequence_length = 128 is longer than the 64 tokens of {half}" in said
    assert window not in lines(data__sequence_length=64)
    assert window not in lines(model__rotary_base=5e5)
    yarn = {"model__rotary_scaling": "yarn", "model__rotary_scaling_factor": 2.0}
    assert window not in lines(**yarn)
    assert "model.rotary_attention_factor = 1.069" in lines(**yarn)
    assert start(half, tmp_path).model.max_position_embeddings == 64


def copied_tokens(folder: Path) -> Path:
    return Path(shutil.copytree(TOKENS, folder / "tokens")) / "validation"


def own_memory() -> int:
    """Bytes of this process that are not pages of files."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


MEDIUM = {"hidden_size": 1024, "intermediate_size": 3584, "vocab_size": 16000, "num_attention_heads": 16}
LLAMA_3_8B = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256, "num_attention_heads": 32}


@pytest.mark.parametrize(
    ("sizes", "shard"),
    [
        pytest.param(MEDIUM, "60MB", id="medium"),
        pytest.param({**LLAMA_3_8B, "num_key_value_heads": 8}, "1GB", id="llama-3-8b", marks=pytest.mark.slow),
    ],
)
def test_a_rank_holds_its_own_part_and_no_more(tmp_path, sizes, shard):
    folder = tmp_path / "model"
    save_model(folder, LlamaConfig(**{**SIZES, **sizes, "num_hidden_layers": 2}), shard, torch.bfloat16)
    config = configuration(folder, {"tensor": 4})
    config = config.model_copy(update={"training": config.training.model_copy(update={"precision": "bf16"})})

    def load() -> tuple[int, int]:
        from moba_megatron import platform
        from moba_megatron.convert.initial import sized
        from moba_megatron.convert.weights import open_weights, read_weights
        from moba_megatron.model.builder import build_model
        from moba_megatron.model.schedule import AttentionSchedule

        platform.start_model_parallel(config.parallel)
        before, peak = own_memory(), 0

        def watch(done: int, total: int) -> None:
            nonlocal peak
            peak = max(peak, own_memory() - before)

        vocabulary = sizes["vocab_size"]
        (model,) = build_model(config, vocabulary, AttentionSchedule.from_config(config.attention, 2))
        section = sized(config.model, vocabulary)
        read_weights([model], open_weights(folder, section), section, advance=watch)
        return peak, sum(p.numel() * p.element_size() for p in model.parameters())

    whole = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    for peak, own in run_ranks(4, load):
        assert own < 0.26 * whole
        assert peak < 1.2 * own + 2**22
