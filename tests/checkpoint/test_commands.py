"""`moba-megatron checkpoint` and `doctor RUN`: what they show of a sound run, and of a damaged one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from distributed import run_ranks
from small_run import small_config, train_here
from typer.testing import CliRunner

from moba_megatron.checkpoint import Manifest
from moba_megatron.checkpoint.inspection import setting_differences, tensor_differences, tensor_facts
from moba_megatron.cli import app
from moba_megatron.convert.exported import open_exported
from moba_megatron.convert.run_exports import export_in_run

ASSETS = Path(__file__).parents[1] / "assets/checkpoints"


def call(*words: object, code: int = 0) -> str:
    """What the command prints, without the lines of its tables."""
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*map(str, words)])
    assert result.exit_code == code, (result.output, result.exception)
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with checkpoints of steps 2 and 4 and an export of step 4."""
    config = small_config(tmp_path_factory.mktemp("finished"), training__steps=4, checkpoint__every=2)
    run_ranks(1, train_here, config)
    export_in_run(open_exported(config.run.dir))
    return Path(config.run.dir)


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_a_sound_run_is_sound(run):
    shown = call("checkpoint", "verify", run)
    assert shown.count("as it was written") == 3 and "damaged" not in shown
    shown = call("checkpoint", "list", run)
    assert "step_2 8 1,024" in shown and "step_4 16 2,048" in shown and "megatron-core" in shown
    shown = call("doctor", run)
    assert "status.json finished at step 4" in shown and "metrics.jsonl 4 lines" in shown and "damaged" not in shown
    assert "that of the newest checkpoint" in shown and "exports/step_4 export" in shown
    assert call("checkpoint", "verify", run / "exports/step_4").count("as it was written") == 1


def test_inspect_shows_shapes_dtypes_and_norms(run):
    shown = call("checkpoint", "inspect", run)
    assert "step 4 of 4" in shown and "tokens 2,048" in shown
    assert "decoder.layers.mlp.linear_fc2.weight 4 x 32 x 64 float32 4 " in shown and "optimizer" not in shown
    assert "optimizer.state.exp_avg" in call("checkpoint", "inspect", run / "checkpoints/step_2", "--optimizer")
    facts = {fact.key: fact for fact in tensor_facts(run / "checkpoints/step_4")}
    norm = facts["decoder.final_layernorm.weight"]
    assert norm.finite and 5 < norm.norm < 6.5 and 0.9 < norm.largest < 1.2


def test_diff_finds_the_largest_difference_first(run):
    first, second = (run / f"checkpoints/step_{step}" for step in (2, 4))
    found = tensor_differences(first, second)
    sizes = [difference.largest for difference in found]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] > 0 and not any(difference.same for difference in found)
    assert all(difference.same for difference in tensor_differences(first, first, optimizer=True))
    shown = call("checkpoint", "diff", first, run)
    assert (
        "step 2 4" in shown and "consumed_samples 8 16" in shown and f"{found[0].key} {found[0].largest:.3e}" in shown
    )
    assert "0 settings and counts differ; 0 of" in call("checkpoint", "diff", run, run)


def test_diff_compares_other_models_and_releases(run):
    both = [ASSETS / release / "step_4" for release in ("0.16", "0.19")]
    assert "0 of 32 tensors differ, 32 are the same" in call("checkpoint", "diff", *both, "--optimizer")
    assert set(setting_differences(*map(Manifest.read, both))) == {"versions.megatron-core", "versions.torch"}
    assert "[32] against [16]" in call("checkpoint", "diff", run, both[0])


def test_damage_ends_with_one_and_is_named(copy):
    shard = next((copy / "checkpoints/step_2").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (copy / "checkpoints/step_4/surplus").write_text("")
    (copy / "exports/step_4/model.safetensors").write_bytes(b"")
    (copy / "metrics.jsonl").write_text((copy / "metrics.jsonl").read_text().replace('"step": 3', '"step": 7'))
    (copy / "status.json").write_text("{")
    for command in (("checkpoint", "verify"), ("doctor",)):
        shown = call(*command, copy, code=1)
        assert f"{shard.name} has " in shown and "surplus is not in checkpoint.json" in shown
        assert "model.safetensors has 0 bytes" in shown
    assert "step 7 follows step 2" in shown and "status.json: cannot be read" in shown
    (copy / "checkpoints/step_4/checkpoint.json").unlink()
    assert "step_4: " in call("checkpoint", "verify", copy, code=1)
    (copy / "checkpoints/step_2").rename(copy / "checkpoints/step_3")
    assert "the folder is called step_3" in call("checkpoint", "list", copy, code=1)


def test_what_is_nothing_is_said(tmp_path):
    for command, code in (("verify", 2), ("list", 2), ("inspect", 2)):
        call("checkpoint", command, tmp_path, code=code)
    assert "is not a run folder" in call("doctor", tmp_path, code=2)


def test_counts_that_contradict_each_other_are_refused(copy):
    folder = copy / "checkpoints/step_4"
    manifest = Manifest.read(folder)
    for change, says in (
        ({"step": 3}, "the folder is called step_4"),
        ({"step": 40}, "training.steps = 4"),
        ({"consumed_samples": 17}, "consumed_tokens = 2048, but 17 samples"),
        ({"consumed_samples": 0, "consumed_tokens": 0}, "consumed_samples = 0 after step 4"),
        ({"consumed_tokens": 1}, "consumed_tokens = 1"),
        ({"files": {}}, "is not in checkpoint.json"),
        ({"config": {}}, "its configuration lacks"),
        ({"step": "4"}, "step: Input should be a valid integer"),
    ):
        replace(manifest, **change).write(folder)
        assert says in call("checkpoint", "verify", folder, code=1), change
    manifest.write(folder)
    call("checkpoint", "verify", folder)
    values = json.loads((folder / "checkpoint.json").read_text())
    for key in ("step", "consumed_samples", "consumed_tokens", "format"):
        (folder / "checkpoint.json").write_text(json.dumps({**values, key: values[key] + 1}))
        assert "damaged" in call("checkpoint", "verify", folder, code=1)
    # A version before these wrote no digest of it.
    del values["blake2b"]
    (folder / "checkpoint.json").write_text(json.dumps(values))
    call("checkpoint", "verify", folder)
    # A copy may have a name of its own.
    call("checkpoint", "verify", folder.rename(copy / "the best one"))
