"""A run whose configuration has relative paths, used from another folder than the one it was started in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from distributed import run_ranks
from small_run import small_values, train_here
from typer.testing import CliRunner

from moba_megatron.cli import app
from moba_megatron.config import ConfigError, config_from_dict
from moba_megatron.convert.run_inputs import keep_tokenizer
from moba_megatron.corpus.tokenizer import Tokenizer
from moba_megatron.runs.folder import RunFolder
from moba_megatron.training.preflight import preflight


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The folder that a training was started in."""
    return tmp_path_factory.mktemp("started")


@pytest.fixture(scope="module")
def run(started):
    """Its run folder, of a finished training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(started)
        run_ranks(1, train_here, config_from_dict(values(started)))
    return started / "run"


def values(folder: Path) -> dict:
    def relative(value):
        if isinstance(value, dict):
            return {key: relative(item) for key, item in value.items()}
        return value.replace(f"{folder}/", "") if isinstance(value, str) else value

    return relative(small_values(folder, training__steps=2, optimizer__warmup_steps=0))


def call(*arguments: object) -> str:
    def command() -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return result.exit_code, result.output

    ((code, output),) = run_ranks(1, command, prepare=False)
    assert code == 0, output
    return output


def test_a_run_keeps_its_tokenizer_and_says_where_it_was_started(run, started):
    assert Tokenizer(run / "tokenizer").fingerprint == Tokenizer(started / "tokens/tokenizer").fingerprint
    assert json.loads((run / "environment.json").read_text())["working directory"] == str(started)
    assert not list(run.glob(".tokenizer*"))


def test_a_run_is_used_from_any_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "validation loss" in call("evaluate", run, "--samples", 2)
    assert call("generate", run, "--prompt", "w5 w6", "--tokens", 2)
    call("export-hf", run, tmp_path / "hf")
    assert Tokenizer(tmp_path / "hf").fingerprint == Tokenizer(run / "tokenizer").fingerprint
    # What lies at the same path in the working directory wins.
    (tmp_path / "tokens").mkdir()
    for file in (run.parent / "tokens").glob("train.*"):
        shutil.copy(file, tmp_path / "tokens" / file.name.replace("train", "validation"))
    own = json.loads((run / "evaluations.jsonl").read_text().splitlines()[0])["loss"]
    call("evaluate", run, "--samples", 2, "--attention", "moba")
    assert json.loads((run / "evaluations.jsonl").read_text().splitlines()[-1])["loss"] != own


def test_a_run_without_its_first_tokenizer_goes_on_with_its_copy(run, tmp_path):
    shutil.copytree(run.parent, tmp_path / "moved")
    config = config_from_dict(small_values(tmp_path / "moved", training__steps=2, optimizer__warmup_steps=0))
    data = config.data.model_copy(update={"tokenizer": str(tmp_path / "moved/gone")})
    allowed = config.checkpoint.model_copy(update={"allow_changed": ["data"]})
    ready = preflight(config.model_copy(update={"data": data, "checkpoint": allowed}), 1)
    assert ready.resume.name == "step_2"


def test_relative_paths_that_lead_nowhere_say_where_they_count_from(started, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"data.tokenizer = tokens/tokenizer: .*count from {tmp_path}\)"):
        preflight(config_from_dict(values(started)), 1)


def test_another_tokenizer_takes_the_place_of_the_one_kept(run, started, tmp_path):
    folder = RunFolder(shutil.copytree(run, tmp_path / "run"))
    other = Path(shutil.copytree(started / "tokens/tokenizer", tmp_path / "other"))
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"w5"', '"word5"'))
    keep_tokenizer(other, folder, 2)
    before = Tokenizer(folder.path / "tokenizer.until_step_2").fingerprint
    assert before == Tokenizer(run / "tokenizer").fingerprint != Tokenizer(folder.tokenizer).fingerprint
