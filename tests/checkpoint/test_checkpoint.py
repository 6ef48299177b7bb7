"""Checkpoints: what is damaged is refused with the reason, what is unfinished is not seen, what is old goes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from distributed import run_ranks
from small_run import read_metrics, small_config, train_here

from moba_megatron.checkpoint import CheckpointError, Manifest, find_latest, list_checkpoints
from moba_megatron.checkpoint.manifest import NAME, verify


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with checkpoints of every step, the newest two kept."""
    folder = tmp_path_factory.mktemp("checkpointed")
    config = small_config(folder, training__steps=4, checkpoint__every=1)
    run_ranks(1, train_here, config)
    return config


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the newest checkpoint that a test may damage."""
    return Path(shutil.copytree(find_latest(Path(run.run.dir) / "checkpoints"), tmp_path / "step_4"))


def test_retention_keeps_the_newest(run):
    folder = Path(run.run.dir) / "checkpoints"
    assert [path.name for path in list_checkpoints(folder)] == ["step_3", "step_4"]
    assert sorted(path.name for path in folder.iterdir()) == ["step_3", "step_4"]


def test_the_manifest_tells_everything_without_torch(copy):
    manifest = Manifest.read(copy)
    assert (manifest.step, manifest.consumed_samples) == (4, 16)
    assert manifest.config["model"]["num_layers"] == 4
    assert set(manifest.files) == {p.name for p in copy.iterdir()} - {NAME}
    assert verify(copy, manifest) == []


@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_every_kind_of_damage_to_every_file_is_found(copy, damage):
    manifest = Manifest.read(copy)
    for name in manifest.files:
        path = copy / name
        content = path.read_bytes()
        middle = len(content) // 2
        if damage == "cut":
            path.write_bytes(content[:middle])
        elif damage == "flip":
            path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        else:
            path.unlink()
        assert [name in line for line in verify(copy, manifest)] == [True]
        path.write_bytes(content)


def test_a_damaged_checkpoint_is_refused_on_resume(run, copy):
    shard = next(copy.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    elsewhere = run.run.model_copy(update={"dir": str(copy.parent / "run")})
    named = run.checkpoint.model_copy(update={"resume": str(copy)})
    config = run.model_copy(update={"checkpoint": named, "run": elsewhere})
    with pytest.raises(AssertionError, match=rf"is damaged: {shard.name} has \d+ bytes"):
        run_ranks(1, train_here, config)


def test_an_unfinished_checkpoint_is_not_seen(copy):
    folder = copy.parent
    (folder / ".step_9.partial").mkdir()
    (folder / "step_7").mkdir()
    assert list_checkpoints(folder) == [copy]
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        Manifest.read(folder / "step_7")


def test_a_checkpoint_of_another_format_is_refused(copy):
    values = json.loads((copy / NAME).read_text())
    (copy / NAME).write_text(json.dumps({**values, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        Manifest.read(copy)


@pytest.mark.parametrize(
    ("saved", "later"),
    [
        ({"pipeline": 2, "pipeline_layers": [3, 1]}, {}),
        ({"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": [2, 1, 1, 0]}, {}),
        ({"tensor": 2, "pipeline": 2}, {"context": 2}),
    ],
    ids=["uneven-stages", "uneven-chunks", "tensor-pipeline-to-context"],
)
def test_a_run_goes_on_at_another_layout_with_the_same_losses(tmp_path, saved, later):
    """Weights and optimizer state of every layer come back as they were."""

    def run(folder: str, parallel: dict, **changes):
        layout = {f"parallel__{name}": value for name, value in parallel.items()}
        config = small_config(tmp_path, run__dir=str(tmp_path / folder), training__steps=4, **layout, **changes)
        ranks = config.parallel.tensor * config.parallel.pipeline * config.parallel.context
        run_ranks(ranks, train_here, config, ranks)
        return read_metrics(tmp_path / folder)[-2:]

    before = run("before", saved, checkpoint__every=2)
    after = run("after", later, checkpoint__resume=str(tmp_path / "before/checkpoints/step_2"))
    for ours, theirs in zip(after, before, strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_another_optimizer_kind_is_refused(run):
    changed = run.parallel.model_copy(update={"distributed_optimizer": True})
    with pytest.raises(AssertionError, match="distributed_optimizer = False"):
        run_ranks(1, train_here, run.model_copy(update={"parallel": changed}))
