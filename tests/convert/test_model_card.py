"""The card of an export: where the model comes from, and how it does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from distributed import run_ranks
from huggingface_models import SIZES, save_model
from small_run import TOKENS, small_config, train_here
from transformers import LlamaConfig

from moba_megatron.config import config_from_dict
from moba_megatron.convert.export_hf import export_huggingface
from moba_megatron.convert.exported import open_exported
from moba_megatron.convert.import_hf import import_huggingface
from moba_megatron.convert.model_card import evaluation_table
from moba_megatron.convert.origin import origin_of, read_card, read_origin
from moba_megatron.runs.folder import RunFolder

LICENSE = {"license": "other", "license_name": "llama3.1", "license_link": "LICENSE"}
ENTRIES = 128


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model as the hub's cache holds it, with a card."""
    folder = tmp_path_factory.mktemp("hub") / "models--some-org--Llama-3.1-8B/snapshots/abc"
    save_model(folder, LlamaConfig(**{**SIZES, "vocab_size": ENTRIES}))
    shutil.copytree(TOKENS / "tokenizer", folder, dirs_exist_ok=True)
    head = yaml.safe_dump({"language": ["en"], **LICENSE})
    (folder / "README.md").write_text(f"---\n{head}---\n# A model\n\n---\nnot: the head\n---\n")
    return folder


def started_from(source: Path, folder: Path) -> Path:
    """A run of one step."""
    values = small_config(folder, training__steps=1, attention__kind="full", optimizer__warmup_steps=0).model_dump(
        mode="json"
    )
    values["model"] = {"init_from": str(source)}
    run_ranks(1, train_here, config_from_dict(values))
    return Path(values["run"]["dir"])


def export(run: Path, out: Path) -> tuple[dict, str]:
    export_huggingface(open_exported(run), out)
    return read_card(out), (out / "README.md").read_text()


def test_base_model_and_license_go_from_hand_to_hand(source, tmp_path):
    """Over an import, a run, a run that starts from it, and an export that is a source again; the source is gone."""
    copy = Path(shutil.copytree(source, tmp_path / source.relative_to(source.parents[2])))
    known = {"base_model": "some-org/Llama-3.1-8B", **LICENSE}
    run_ranks(1, import_huggingface, copy, tmp_path / "imported")
    direct = started_from(copy, tmp_path / "direct")
    shutil.rmtree(copy.parents[1])
    second = started_from(direct, tmp_path / "second")
    for run in (tmp_path / "imported", direct, second):
        assert read_origin(RunFolder(run)) == known
    head, _ = export(second, tmp_path / "out")
    assert head == {"library_name": "transformers", "pipeline_tag": "text-generation", **known}
    assert origin_of(tmp_path / "out") == known


def test_what_is_not_known_is_left_out(source, tmp_path):
    plain = Path(shutil.copytree(source, tmp_path / "model"))
    (plain / "README.md").write_text("# No head\n")
    assert origin_of(plain) == {}
    (plain / "README.md").write_text("---\n{broken: [\n---\n")
    assert origin_of(plain) == {}
    values = json.loads((plain / "config.json").read_text())
    for name, base in (("some/where", "some/where"), (str(tmp_path), None), ("checkpoint-10", None)):
        (plain / "config.json").write_text(json.dumps({**values, "_name_or_path": name}))
        assert origin_of(plain).get("base_model") == base
    (plain / "README.md").write_text("---\nbase_model: [a/b, c/d]\nlicense: mit\n---\n")
    assert origin_of(plain) == {"base_model": ["a/b", "c/d"], "license": "mit"}


def test_evaluations_of_the_checkpoint_are_in_the_card(source, tmp_path):
    run = started_from(source, tmp_path)
    head = {"step": 1, "tokens": 512}
    losses = {"kind": "losses", "data": "/d/validation", "samples": 8, "loss": 2.5, "trailing_loss": None}
    tasks = {"kind": "tasks", "haystack": "noise", "samples": 10, "needle_1024_greedy_match": 0.75}
    lines = [
        {**head, **losses, "attention": "full", "loss": 9.0},
        {**head, **losses, "attention": "full"},
        {**head, **losses, "attention": "moba", "loss": 2.625},
        {**head, **losses, "attention": "moba", "loss": 7.0, "choice": "B=8 K=2"},
        {**head, **tasks, "attention": "moba"},
        {**head, "kind": "lm_eval", "limit": 5, "capitals/acc": 0.5, "attention": "full"},
        {**head, "kind": "routing", "mass_held": 0.25, "attention": "moba"},
        {**head, **tasks, "step": 2, "attention": "moba", "needle_1024_greedy_match": 0.125},
    ]
    with RunFolder(run).evaluations.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    _, card = export(run, tmp_path / "out")
    table = card[card.index("## Evaluation") :].splitlines()
    assert table == [
        "## Evaluation",
        "",
        "| | moba attention | full attention |",
        "|---|---|---|",
        "| mean loss on validation, 8 samples (nats per token) | 2.625 | 2.5 |",
        "| `needle_1024_greedy_match` (noise, 10 samples) | 0.75 |  |",
        "| capitals/acc (lm-eval, first 5 samples) |  | 0.5 |",
    ]
    assert evaluation_table(lines, 3) == ""
