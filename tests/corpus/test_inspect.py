from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from moba_megatron import cli
from moba_megatron.corpus.manifest import load_manifest
from moba_megatron.corpus.prepare_command import inspect_command

app = typer.Typer()
app.command()(inspect_command)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_manifest_in_words(dataset: Path):
    result, manifest = run(dataset), load_manifest(dataset)
    assert result.exit_code == 0
    for text in (manifest.tokenizer.fingerprint, manifest.sources[0].hash, "lengths of train", manifest.summary()):
        assert text in result.output


def test_a_document_by_number(dataset: Path, texts: list[str]):
    found = [run(dataset, "--document", number, "--split", "validation").output for number in range(3)]
    for output in found:
        head, _, text = output.partition("\n")
        assert head.startswith("document ") and "of validation" in head
        assert text.removesuffix("<|endoftext|>\n") in texts
    last = load_manifest(dataset).splits["train"].documents - 1
    assert run(dataset, "--document", last).exit_code == 0
    for arguments, message in (
        (["--document", last + 1], f"train has the documents 0 to {last}"),
        (["--document", -1], f"train has the documents 0 to {last}"),
        (["--document", 0, "--split", "test"], "has no split 'test', only train, validation"),
    ):
        result = run(dataset, *arguments)
        assert (result.exit_code, message in result.output) == (2, True), result.output
    result = run(dataset.parent)
    assert (result.exit_code, "is not a prepared dataset" in result.output) == (2, True)


@pytest.mark.parametrize("damage", ["none", "flipped", "cut", "index", "lost", "tokenizer"])
def test_checks_find_damage(dataset: Path, tmp_path: Path, damage: str):
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    data, index = copy / "train.bin", copy / "train.idx"
    whole = data.read_bytes()
    if damage == "flipped":
        data.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    elif damage == "cut":
        data.write_bytes(whole[:-2])
    elif damage == "index":
        index.write_bytes(index.read_bytes()[:-100])
    elif damage == "lost":
        (copy / "validation.idx").unlink()
    elif damage == "tokenizer":
        path = copy / "tokenizer/tokenizer.json"
        path.write_text(path.read_text().replace('"<|endoftext|>"', '"<|end|>"'))
    wrong = {
        "none": set(),
        "flipped": {"train.bin"},
        "cut": {"train.bin", "documents of train"},
        "index": {"train.idx", "documents of train"},
        "lost": {"validation.idx", "documents of validation"},
        "tokenizer": {"tokenizer"},
    }[damage]
    result = run(copy, "--check")
    lines = dict(line.split(": ", 1) for line in result.output.splitlines() if not line.startswith("error"))
    assert {what for what, verdict in lines.items() if verdict != "ok"} == wrong, result.output
    assert len(lines) == 1 + 4 + 2
    assert result.exit_code == (1 if wrong else 0)


def test_the_installed_command_knows_the_words_after_prepare(dataset: Path):
    result = CliRunner().invoke(cli.app, ["prepare", "inspect", str(dataset)])
    assert result.exit_code == 0 and "lengths of train" in result.output
    result = CliRunner().invoke(cli.app, ["prepare", "merge", str(dataset) + "-not-there"])
    assert (result.exit_code, "no unfinished work" in result.output) == (2, True)
    # A recipe after `prepare`, as ever.
    result = CliRunner().invoke(cli.app, ["prepare", "none.yaml", str(dataset)])
    assert (result.exit_code, "no such recipe" in result.output) == (2, True)
