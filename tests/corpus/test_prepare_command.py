from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

from moba_megatron.corpus.direct import direct_sources
from moba_megatron.corpus.files import find_files
from moba_megatron.corpus.manifest import load_manifest
from moba_megatron.corpus.prepare import merge_shares
from moba_megatron.corpus.prepare_command import prepare_command
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


def test_kinds_of_input_by_name_and_by_what_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    rows, text = b'{"text": "a"}\n', b"some text\n"
    contents = {
        **dict.fromkeys(["rows.ndjson", "ROWS.JSONL", "a/x.jsonl.GZ", "spark/part-00000", "spark/_SUCCESS.crc"], rows),
        **dict.fromkeys(
            ["one.md", "docs/deep/two.md", "docs/three.md", "code/main.c", "texts/a.txt", "mixed/a.txt"], text
        ),
        **dict.fromkeys(["mixed/b.jsonl", "unknown.data", "code/tool [x].json"], rows),
        "table.csv": b"a,b\n",
        "code/braces.c": b"{ not json }",
        "texts/left.md": text,
        "b.parquet": b"PAR1",
        "c.bin": b"PAR1",
    }
    for name, data in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)

    def sources(*paths: str, kind: str | None = None) -> list[tuple[str, str, str | None]]:
        found, _ = direct_sources([*paths], None, "train", None, kind)
        return [(s["kind"], s["path"], s.get("pattern")) for s in found]

    for path in ("rows.ndjson", "ROWS.*", "a/*", "spark/part-*", "code/tool [x].json"):
        assert sources(path) == [("jsonl", path, None)]
    (tmp_path / "spark/part-00001.gz").write_bytes(gzip.compress(rows))
    assert sources("spark", "spark/part-*") == [("jsonl", "spark", None), ("jsonl", "spark/part-*", None)]
    assert find_files("spark", "jsonl").names == ["spark/part-00000", "spark/part-00001.gz"]
    # Empty partitions say nothing of the kind, and parts of text are texts.
    (tmp_path / "spark/part-00002").write_bytes(b"")
    assert sources("spark") == [("jsonl", "spark", None)]
    (tmp_path / "said").mkdir()
    (tmp_path / "said/part-00000").write_bytes(text)
    assert sources("said") == [("files", "said", "**/part-*")]
    (tmp_path / "texts/B.TXT").write_bytes(text)
    assert sources("texts") == [("files", "texts", "**/*.[tT][xX][tT]")]
    (tmp_path / "texts/B.TXT").unlink()
    assert sources("mixed", kind="files") == [("files", "mixed", "**/*")]
    (tmp_path / "notes.gz").write_bytes(gzip.compress(text))
    assert sources("b.parquet", "c.bin") == [("parquet", "b.parquet", None), ("parquet", "c.bin", None)]
    assert sources("one.md", "docs/**/*.md", "texts", "code/*.c") == [
        ("files", ".", "one.md"),
        ("files", "docs", "**/*.md"),
        ("files", "texts", None),
        ("files", "code", "*.c"),
    ]
    assert direct_sources(["texts"], None, "train", "t")[1] == ["texts: 1 of 2 files are left out (.md 1)"]
    assert sources("unknown.data", kind="jsonl") == [("jsonl", "unknown.data", None)]
    for path, message in (
        ("unknown.data", "looks like JSON, but its ending is not known: .* `--kind jsonl`"),
        ("*.csv", "this kind of table is not supported"),
        ("notes.gz", "is compressed; only JSON Lines may be"),
        (
            "mixed",
            r"several kinds: 1 of kind files \(mixed/a.txt\), 1 of kind jsonl \(mixed/b.jsonl\): give one --input",
        ),
        ("docs", r"no file of a known ending, only .md 2"),
        ("none/*.jsonl", f"no file matches none/.*; relative paths count from {tmp_path}"),
    ):
        with pytest.raises(ValueError, match=message):
            sources(path)


def test_inputs_take_overrides(tmp_path: Path, tokenizer: Tokenizer):
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"body": "{"long " * n}"}}\n' for n in range(1, 40)))
    given = ["--input", tmp_path / "rows.jsonl", "--tokenizer", tokenizer.folder, "--validation", "0", tmp_path / "out"]
    result = run(*given, "sources.0.text_column=body", "filters.min_characters=100")
    assert result.exit_code == 0, result.output
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.splits["train"].documents, manifest.filtered) == (20, 19)
    rows = [{"talk": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}] * 3
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    talks = ["--input", tmp_path / "talks.jsonl", "--tokenizer", tokenizer.folder, tmp_path / "talks"]
    result = run(*talks, "sources.0.messages_column=talk")
    assert (result.exit_code, "needs a chat template" in result.output) == (2, True), result.output
    result = run(*given, tmp_path / "more")
    assert (result.exit_code, "give one folder, OUT, and key=value" in result.output) == (2, True)
    result = run(*given, "filters.min_caracters=100")
    assert (result.exit_code, "filters.min_caracters: unknown key" in result.output) == (2, True)
