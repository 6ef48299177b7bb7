"""A run that starts from a Hugging Face model: the same first loss at every layout, from the folder or its import; and
each rank reads no more than its part."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import run_ranks
from huggingface_models import LLAMA3, SIZES, save_model
from small_run import TOKENS, read_metrics, small_config, train_here
from test_logits import configuration
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from moba_megatron.cli import app
from moba_megatron.config import Config, config_from_dict
from moba_megatron.data.datasets import build_datasets
from moba_megatron.data.feed import rank_batches
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
    """The same, imported by the command, which holds it against transformers."""
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


def test_an_imported_model_generates_evaluates_and_is_exported(imported, tmp_path):
    assert call("generate", imported, "--prompt", "w5 w6", "--tokens", 3, "--temperature", 0)
    assert "validation loss" in call("evaluate", imported, "--validation", copied_tokens(tmp_path), "--samples", 4)
    assert "verified" in call("export-hf", imported, tmp_path / "out", "--verify")
    assert "nothing is overwritten" in call("export-hf", imported, tmp_path / "out", code=2)
    assert "no config.json" in call("import-hf", tmp_path, tmp_path / "in", code=2)


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
