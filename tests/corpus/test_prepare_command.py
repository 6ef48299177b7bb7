from __future__ import annotations

import json
from pathlib import Path

import typer
import yaml
from typer.testing import CliRunner, Result

from moba_megatron.corpus.manifest import load_manifest
from moba_megatron.corpus.prepare import merge_shares
from moba_megatron.corpus.prepare_command import direct_sources, prepare_command
from moba_megatron.corpus.recipe import Recipe
from moba_megatron.corpus.tokenizer import Tokenizer

app = typer.Typer()
app.command("prepare")(prepare_command)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments), "--workers", "1"])


def test_a_recipe_with_overrides(recipe: Recipe, tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump()))
    result = run(tmp_path / "recipe.yaml", tmp_path / "out", "split.validation=0.3")
    assert result.exit_code == 0, result.output
    assert "train: " in result.output and "bytes a token" in result.output
    assert load_manifest(tmp_path / "out").identity["recipe"]["split"] == {"validation": 0.3}


def test_files_without_a_recipe(tmp_path: Path, tokenizer: Tokenizer, texts: list[str]):
    lines = "".join(json.dumps({"body": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    flags = [
        "--input",
        tmp_path / "*.jsonl",
        "--text-column",
        "body",
        "--tokenizer",
        tokenizer.folder,
        "--validation",
        "0.2",
    ]
    result = run(tmp_path / "out", *flags)
    assert result.exit_code == 0, result.output
    assert load_manifest(tmp_path / "out").sources[0].documents == len(texts)


def test_errors_are_one_line_and_a_code(tmp_path: Path, recipe: Recipe):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump()))
    for arguments, message in (
        ([tmp_path / "none.yaml", tmp_path / "out"], "error: no such recipe"),
        ([tmp_path / "recipe.yaml", tmp_path / "out", "splt.validation=0.1"], "error: splt: unknown key"),
        ([tmp_path / "out"], "error: give a recipe and the folder"),
        ([tmp_path / "out", "--input", tmp_path / "a.txt"], "error: give either --tokenizer DIR or --train-tokenizer"),
        (
            [tmp_path / "out", "--input", tmp_path / "a.jsonl", "--train-tokenizer", "300"],
            "error: no documents: no file",
        ),
    ):
        result = run(*arguments)
        assert (result.exit_code, message in result.output) == (2, True), result.output


def test_shares_by_the_command(tmp_path: Path, recipe: Recipe):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump()))
    for share in ("0/2", "1/2"):
        result = run(tmp_path / "recipe.yaml", tmp_path / "out", "--shard", share)
        assert result.exit_code == 0, result.output
        assert not (tmp_path / "out").exists()
    assert merge_shares(tmp_path / "out") == load_manifest(tmp_path / "out")
    for share in ("2/2", "1", "a/b", "-1/2", "0/0"):
        result = run(tmp_path / "recipe.yaml", tmp_path / "out", f"--shard={share}")
        assert (result.exit_code, f"--shard {share}: give I/N" in result.output) == (2, True), result.output


def test_kinds_of_input_by_their_endings(tmp_path: Path):
    (tmp_path / "one.md").write_text("x")
    sources = direct_sources(
        ["a/*.jsonl.zst", "b.parquet", "c.arrow", "docs/**/*.md", str(tmp_path), str(tmp_path / "one.md")],
        "hub/name",
        "train",
        "t",
    )
    assert [source["kind"] for source in sources] == [
        *("jsonl", "parquet", "arrow", "files", "files", "files", "datasets")
    ]
    assert [(s["path"], s.get("pattern")) for s in sources[3:6]] == [
        ("docs", "**/*.md"),
        (str(tmp_path), None),
        (str(tmp_path), "one.md"),
    ]
